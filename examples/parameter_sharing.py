"""Workers that compute gradients on a model's parameters while the main program updates them.

The parameters are not sent to and fro: all processes look at the same memory. In each round the workers compute the
gradient of their part of the data, and add it to a tensor that they share, one at a time, under a mutex. The
barrier keeps the rounds apart: nobody updates while others compute, and nobody computes while the update is made.

    python examples/parameter_sharing.py
    python examples/parameter_sharing.py --backend thread
"""

import argparse

import torch

import torchwq

ROUNDS = 150
WORKERS = 3
RATE = 0.3


def compute_gradients(
    mutex: torchwq.Mutex,
    weights: torch.Tensor,
    gradient: torch.Tensor,
    data: torch.Tensor,
    labels: torch.Tensor,
    rounds: int,
    workers: int,
    mapid: int,
) -> float:
    # Runs in a worker. `weights` and `gradient` are the main program's own memory
    part, wanted = data[mapid::workers], labels[mapid::workers]
    loss = 0.0
    for _ in range(rounds):
        mutex.barrier(workers + 1)  # the weights are ready
        error = part @ weights - wanted
        loss = float((error**2).mean())
        own = 2 * part.t() @ error / len(data)
        with mutex:
            gradient += own
        mutex.barrier(workers + 1)  # the gradient is complete
    return loss


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--backend", choices=["process", "thread"], default="process")
options = parser.parse_args()

torch.manual_seed(0)
truth = torch.randn(8)
data = torch.randn(3000, 8)
labels = data @ truth

weights, gradient = torchwq.zeros(8), torchwq.zeros(8)
mutex = torchwq.mutex()
workers = torchwq.map(
    WORKERS,
    compute_gradients,
    *(mutex, weights, gradient, data, labels, ROUNDS, WORKERS),
    backend=options.backend,
)

for _ in range(ROUNDS):
    mutex.barrier(WORKERS + 1)  # let the workers compute
    mutex.barrier(WORKERS + 1)  # they have
    weights -= RATE * gradient
    gradient.zero_()

losses = workers.join()
print(f"after {ROUNDS} rounds the workers' losses are below 1e-6: {max(losses) < 1e-6}")
print(f"the weights are those that made the data: {torch.allclose(weights, truth, atol=1e-3)}")
