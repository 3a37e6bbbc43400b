"""A workqueue with several owners, built from two channels.

A `torchwq.workqueue` has one owner, who asks and gets the answers. With channels, any number of programs may ask: all
write into one channel of work, and each question carries the channel on which its answer is wanted. Workers end
when the channel of work is closed and drained.

    python examples/channels_as_workqueue.py
"""

import torchwq
from torchwq import Channel

OWNERS = 3
WORKERS = 2
QUESTIONS = 5


def work(questions: Channel) -> int:
    # A worker: answers each question where its owner wants the answer
    count = 0
    for number, answers in questions:
        answers.write((number, number**2))
        count += 1
    return count


def own(questions: Channel, count: int, mapid: int) -> list[int]:
    # An owner: asks, and collects its own answers
    import torchwq

    answers = torchwq.channel()
    for number in range(count):
        questions.write((10 * mapid + number, answers))
    found = dict(answers.read()[1] for _ in range(count))
    return [found[10 * mapid + number] for number in range(count)]


questions = torchwq.channel()
workers = torchwq.map(WORKERS, work, questions)
# Owners may be anything: here processes and threads, and this program itself
processes = torchwq.map(OWNERS - 1, own, questions, QUESTIONS)
thread = torchwq.map(1, own, questions, QUESTIONS, backend="thread")
mine = own(questions, QUESTIONS, 9)

for name, answers in (("processes", processes.join()), ("a thread", thread.join()), ("this program", [mine])):
    print(f"{name} got {answers}")

# All questions have been answered: the workers may go
questions.close()
print("answered in all:", sum(workers.join()))
