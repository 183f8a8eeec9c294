# %% [markdown]
# # MaskTune: hide what the network looked at most
#
# Asgari Taghanaki et al. 2022, *MaskTune: mitigating spurious correlations by forcing to explore*:
# a trained network is tuned for one epoch on inputs whose most relevant pixels are zero, so that it
# has to find something else. Groups are not needed, but it cannot tell a shortcut from what makes
# the class: where the most relevant pixels are the object, the network loses those. On these digits
# it does harm. The paper's heatmap is xGradCAM; this one is LRP's.
#
#     python examples/masktune.py

# %%
import argparse
import copy

import torch

import xai_edit as xe
from xai_edit.datasets.small_network import small_cnn, train
from xai_edit.datasets.watermarked_digits import WatermarkedDigits


# %%
def most_relevant(relevance):
    """Return where relevance is above mean + 2 standard deviations of its sample.

    Channels are summed: (samples, channels, height, width) gives (samples, 1, height, width).
    """
    relevance = relevance.sum(1, keepdim=True)
    flat = relevance.flatten(1)
    threshold = flat.mean(1) + 2 * flat.std(1, correction=0)
    return relevance > threshold[:, None, None, None]


def masktune(model, images, labels, *, learning_rate, heatmap, batch_size=64, seed=0):
    """Return a copy tuned on one epoch of masked images; the model stays as it was."""
    tuned = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(tuned.parameters(), lr=learning_rate, momentum=0.9)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    for rows in order.split(batch_size):
        masked = most_relevant(heatmap(model, images[rows], labels[rows]))
        logits = tuned(torch.where(masked, 0, images[rows]))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
    return tuned.eval()


def main(quick):
    digits = WatermarkedDigits()
    training, _, test = digits.split(seed=0)
    torch.manual_seed(0)
    model = small_cnn(digits.size)
    train(model, training.images, training.labels, epochs=3 if quick else 30, seed=0)
    heatmap = xe.LRP("epsilon-plus").heatmap
    for name, network in {
        "trained": model,
        "MaskTune": masktune(
            model, training.images, training.labels, learning_rate=0.001, heatmap=heatmap
        ),
    }.items():
        accuracy = xe.evaluate_groups(network, test.batches)
        print(f"{name:<10} worst group {accuracy.worst:.3f}, balanced {accuracy.balanced:.3f}")


# %%
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="MaskTune on digits with a watermark.")
    parser.add_argument("--quick", action="store_true", help="train for 3 epochs instead of 30")
    main(parser.parse_args().quick)
