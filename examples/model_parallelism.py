"""A model whose layers run in different workers, each working on another batch at the same time.

An `nn.Sequential` is cut into stages. Each stage runs in a worker that reads batches from one channel and writes
what it has made of them to the next. Batches and parameters go by reference: no worker copies them. When the input is
closed, the stages close behind one another, as each of them finds its source drained.

    python examples/model_parallelism.py
    python examples/model_parallelism.py --backend thread
"""

import argparse

import torch
from torch import nn

import torchwq
from torchwq import Channel, ChannelState


def run_stage(stage: nn.Module, source: Channel, sink: Channel) -> int:
    # Runs in a worker. `with` closes the sink when the source is drained; if the stage fails, whoever reads the
    # sink is told
    import torch

    count = 0
    with sink, torch.inference_mode():
        for number, batch in source:
            sink.write((number, stage(batch)))
            count += 1
    return count


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--backend", choices=["process", "thread"], default="process")
parser.add_argument("--batches", type=int, default=24)
options = parser.parse_args()

torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Conv1d(20, 40, 5), nn.Tanh()),
    *(nn.Conv1d(40, 40, 5), nn.Tanh()),
    *(nn.Conv1d(40, 10, 5), nn.Tanh(), nn.AdaptiveMaxPool1d(1), nn.Flatten()),
).eval()
stages = [model[0:2], model[2:4], model[4:]]
batches = [torch.randn(8, 20, 200) for _ in range(options.batches)]

# One channel before each stage, and one behind the last. The first takes few batches at a time: who writes to it waits
# then, so that input does not pile up in front of a slow stage
channels = [torchwq.channel(capacity=4), *(torchwq.channel() for _ in stages)]
workers = [
    torchwq.map(1, run_stage, stage, source, sink, backend=options.backend)
    for stage, source, sink in zip(stages, channels[:-1], channels[1:], strict=True)
]

for item in enumerate(batches):
    channels[0].write(item)
channels[0].close()

outputs = {}
while True:
    state, item = channels[-1].read()
    if state is ChannelState.DRAINED:
        break
    number, output = item
    outputs[number] = output

for number, worker in enumerate(workers):
    print(f"stage {number} has seen {worker.join()[0]} batches")

with torch.inference_mode():
    expected = [model(batch) for batch in batches]
equal = all(torch.allclose(outputs[number], expected[number], atol=1e-6) for number in range(len(batches)))
print("outputs are those of the model in one piece:", equal)
