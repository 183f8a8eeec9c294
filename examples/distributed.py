# %% [markdown]
"""Score the units of a network in several processes, and compare with one.

Each process scores the batches it holds; `UnitScores.all_reduce` joins them:

    torchrun --nproc-per-node 2 examples/distributed.py

Run without torchrun, it starts two processes by itself.
"""

# %%
import argparse
import subprocess
import sys
import time

import torch
import torch.distributed as dist

import xai_edit as xe
from xai_edit.datasets.small_network import small_cnn, train
from xai_edit.datasets.watermarked_digits import WatermarkedDigits

parser = argparse.ArgumentParser(description="Unit scores of several processes and of one.")
parser.add_argument("--quick", action="store_true", help="train for one epoch instead of ten")
arguments = parser.parse_args()

if not dist.is_torchelastic_launched():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    sys.exit(subprocess.call([*torchrun, "--nproc-per-node", "2", *sys.argv]))

# %% [markdown]
# Every process has the same network, from the first one, and its own part of the batches: here
# the parts are uneven, the second twice as large as the first. Whole batches, since the float32
# numbers of a sample depend a little on the batch it is in.

# %%
dist.init_process_group("gloo")  # "nccl" with one GPU a process
rank, ranks = dist.get_rank(), dist.get_world_size()
images, _, _ = WatermarkedDigits().split(seed=0)

torch.manual_seed(0)
model = small_cnn(24).eval()
if rank == 0:
    train(model, images.images, images.labels, epochs=1 if arguments.quick else 10, seed=0)
for weights in model.state_dict().values():
    dist.broadcast(weights, 0)

batches = list(zip(images.images.split(32), images.labels.split(32), strict=True))
starts = [len(batches) * i * (i + 1) // (ranks * (ranks + 1)) for i in range(ranks + 1)]
shard = batches[starts[rank] : starts[rank + 1]]

# %%
scorer = xe.LRP("epsilon-plus")
dist.barrier()
start = time.perf_counter()
scores = xe.score_units(model, shard, scorer).all_reduce()
seconds = time.perf_counter() - start
print(f"process {rank}: {len(shard)} of {len(batches)} batches")

# %% [markdown]
# The first process scores everything once more, alone.

# %%
if rank == 0:
    start = time.perf_counter()
    alone = xe.score_units(model, batches, scorer)
    print(f"{ranks} processes {seconds:.2f} s, one {time.perf_counter() - start:.2f} s")
    worst = 0.0
    for layer in alone:
        size = alone[layer].abs().clamp(min=torch.finfo(torch.float64).tiny)
        worst = max(worst, float(((scores[layer] - alone[layer]).abs() / size).max()))
    same = all(torch.equal(scores.rank(layer), alone.rank(layer)) for layer in alone)
    print(f"largest relative difference {worst:.1e}, the same ranking: {same}")
    if worst > 1e-12 or not same or scores.samples != alone.samples:
        sys.exit("the scores of several processes differ from those of one")
dist.destroy_process_group()
