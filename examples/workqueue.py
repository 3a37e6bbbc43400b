"""A named workqueue and two workers that load files for the owner.

The main program owns the queue: it writes *questions*, here file names, and reads the *answers*. Each
worker is a clean process that opens the queue by its name and sees it the other way round: it reads
questions and writes answers. The tensors in the answers are not copied: owner and worker look at the same
memory.

    python examples/workqueue.py
"""

import os
import tempfile

import torch

import torchwq


def load_files() -> None:
    # This function is not a closure: it runs in a totally clean environment, and imports what it needs
    import torch

    import torchwq

    # Open the queue by name (the main program already created it)
    q = torchwq.workqueue("my queue")
    while True:
        # Read the next file name off the workqueue
        file_name = q.read()
        if file_name is None:
            break
        # Load the file and write its contents back into the workqueue
        q.write(torch.load(file_name))


with tempfile.TemporaryDirectory() as folder:
    # Some real files to load; workers start in the working directory of their owner
    os.chdir(folder)
    for number in (1, 2, 3):
        torch.save({"file": f"f{number}.pt", "values": torch.arange(3) * number}, f"f{number}.pt")

    # Create a named workqueue
    q = torchwq.workqueue("my queue")

    # Create 2 background workers that read from the named workqueue
    workers = torchwq.map(2, load_files)

    # Write the file names into the workqueue
    q.write("f1.pt")
    q.write("f2.pt")
    q.write("f3.pt")

    # Read back the 3 answers and print them
    print(q.read())
    print(q.read())
    print(q.read())

    # None ends a worker: one for each
    q.write(None, None)
    workers.join()
    q.close()
    os.chdir(os.path.dirname(folder))
