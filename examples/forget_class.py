# %% [markdown]
# # Forget a class: neuronal path perturbation
#
# Chang et al., *Zero-shot Class Unlearning via Layer-wise Relevance Analysis and Neuronal Path
# Perturbation*: the neurons most relevant for a class are cut from it, that is their weights to
# the class become zero (the paper switches them off for every class, `scope="neuron"`). Here on a
# ResNet-20 with published weights and CIFAR-10, from 36 images of the class, by several rules and
# a method of Captum, beside the simplest thing that does as well. Then what is still there: a probe
# in the features, and a few steps of training.
#
# The network and the images are in the folder that `XAI_EDIT_DATA` names; without it a small
# network learns scikit-learn's digits and forgets one of those.
#
#     python examples/forget_class.py --out forget-class

# %%
import argparse
import os
from dataclasses import replace
from pathlib import Path

import captum.attr
import torch
from safetensors.torch import load_file

import xai_edit as xe
from xai_edit.datasets.small_network import small_cnn, train
from xai_edit.datasets.watermarked_digits import WatermarkedDigits
from xai_edit.reproduce.image_data import cifar10
from xai_edit.reproduce.networks import ResNet20

parser = argparse.ArgumentParser(description="A class forgotten, and what is still there.")
parser.add_argument("--out", type=Path, help="the edit and pictures of relevance, to this folder")
parser.add_argument("--quick", action="store_true", help="fewer images and methods")
arguments = parser.parse_args()
quick = arguments.quick
FORGET = 3  # of CIFAR-10 the cat


# %%
def real(folder):
    """Return the ResNet-20, and images: to plan from, to find the share, to train, to test."""
    network = ResNet20()
    network.load_state_dict(load_file(folder / "cifar10" / "resnet20.safetensors"))
    training, test = (cifar10(folder, split) for split in ("train", "test"))
    own = test.first(36)
    return (
        network.eval(),
        own[own.labels == FORGET],
        test.first(64, 36),
        training.first(50 if quick else 200),
        test.first(50 if quick else 200, 100),
    )


def digits():
    """Return the same of a small network."""
    training, validation, test = WatermarkedDigits(share=0.0).split(seed=0)
    torch.manual_seed(0)
    epochs = 5 if quick else 20
    network = train(small_cnn(24), training.images, training.labels, epochs=epochs, seed=0)
    plain = [part[part.watermark == 0] for part in (validation, training, test)]
    validation, training, test = plain
    own = validation[validation.labels == FORGET]
    return (network, *(part.batches for part in (own, validation, training, test)))


folder = os.environ.get("XAI_EDIT_DATA")
if folder is None:
    print("CIFAR-10 left out: XAI_EDIT_DATA does not name the folder of real data")
network, own, validation, training, test = digits() if folder is None else real(Path(folder))

# %% [markdown]
# ## By which relevance?
#
# The layer is the one before the output. There all LRP rules rank alike, so that the choice of one
# matters little; random neurons are the bar. `share="auto"` takes as many as it needs.

# %%
scorers = [xe.LRP("epsilon"), xe.LRP("alpha2beta1"), xe.Random()]
if not quick:
    captums = xe.CaptumLayer(captum.attr.LayerConductance, n_steps=8)
    scorers[2:2] = [xe.LRP("gamma+epsilon"), captums, xe.Activation()]

print(f"{'scorer':<34}{'share':>7}{'A_t':>7}{'A_g':>7}")
edits = {}
for scorer in scorers:
    operator = xe.PathPerturbation(share=0.2, scorer=scorer)
    edits[repr(scorer)] = edit = operator.plan(network, own, target=FORGET)
    with edit.applied(network):
        groups = xe.evaluate_groups(network, ((x, y, y) for x, y, *_ in test)).groups
    rest = [accuracy for (label, _), accuracy in groups.items() if label != FORGET]
    name = edit.origin["scorer"][:32]
    print(f"{name:<34}{0.2:>7.3f}{groups[FORGET, FORGET]:>7.3f}{sum(rest) / len(rest):>7.3f}")

edit = xe.PathPerturbation(share="auto").plan(network, own, target=FORGET, validation=validation)
print(f"{'epsilon, share found':<34}{edit.origin['share']:>7.3f}")

# %% [markdown]
# ## What the edit did, and what is still there

# %%
figures = xe.evaluate_unlearning(
    network, edit, train=training, test=test, target=FORGET, analysis=own
)
print(figures)

# %% [markdown]
# ## What a sceptic would do
#
# One weight, or a masked logit, from nothing but the number of the class.

# %%
for operator in (xe.LogitMask(), xe.SingleWeight()):
    plain = operator.plan(network, validation, target=FORGET)
    with plain.applied(network):
        groups = xe.evaluate_groups(network, ((x, y, y) for x, y, *_ in test)).groups
    rest = [accuracy for (label, _), accuracy in groups.items() if label != FORGET]
    name = type(operator).__name__
    print(f"{name:<41}{groups[FORGET, FORGET]:>7.3f}{sum(rest) / len(rest):>7.3f}")

# %% [markdown]
# ## Where the network looks, before and after

# %%
inputs = next(iter(own if isinstance(own, list) else replace(own, batch_size=4)))[0][:4]
maps = xe.before_after_maps(network, edit, inputs, scorers=["epsilon", "alpha1beta0"])
if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    edit.save(arguments.out / "forget.safetensors")
    (arguments.out / "maps.png").write_bytes(maps.png())
    print(f"written: {arguments.out}")
