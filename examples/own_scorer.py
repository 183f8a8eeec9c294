# %% [markdown]
# # Write your own scorer
#
# A scorer is a function of a model, a batch, the target class of each sample and layer names. This
# one is how often a unit fires, checked by `check_scorer` and then used like any other: to prune a
# network that reads handwritten digits, beside LRP and a random ranking.
#
#     python examples/own_scorer.py

# %%
import argparse

import torch

import xai_edit as xe
from xai_edit.datasets.small_network import small_cnn, train
from xai_edit.datasets.watermarked_digits import WatermarkedDigits
from xai_edit.testing import check_scorer

parser = argparse.ArgumentParser(description="A scorer of one's own, checked and used.")
parser.add_argument("--quick", action="store_true", help="train for 3 epochs instead of 20")
arguments = parser.parse_args()


# %%
def firing_rate(model, inputs, targets, layers):
    """Return at what share of its positions a unit is positive (Hu et al. 2016)."""
    rates = {}

    def keep(name):
        def hook(module, args, output):
            fires = (output > 0).to(output.dtype)
            rates[name] = fires.reshape(*fires.shape[:2], -1).mean(2)  # (samples, units)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return rates


check_scorer(firing_rate)


# %% [markdown]
# What a check says when a promise is broken: this one forgets `finally`.


# %%
def forgetful(model, inputs, targets, layers):
    rates = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: rates.update(
                {name: (output > 0).to(output.dtype).reshape(*output.shape[:2], -1).mean(2)}
            )
        )
        for name in layers
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return rates


try:
    check_scorer(forgetful)
except AssertionError as problem:
    print(problem)


# %% [markdown]
# A scorer that looks only at the weights says so; it is called once, with None for the samples.


# %%
def largest_weight(model, inputs, targets, layers):
    """Return the largest absolute weight of each unit."""
    weights = {name: model.get_parameter(f"{name}.weight").detach() for name in layers}
    return {name: weight.abs().flatten(1).amax(1)[None] for name, weight in weights.items()}


largest_weight.needs_data = False
check_scorer(largest_weight)

# %% [markdown]
# ## Used like any other

# %%
digits = WatermarkedDigits(share=0.0)
training, validation, test = digits.split(seed=0)
torch.manual_seed(0)
model = small_cnn(digits.size)
train(model, training.images, training.labels, epochs=3 if arguments.quick else 20, seed=0)
loader = validation.batches

# %%
scores = xe.score_units(model, loader, firing_rate, layers=["conv2", "fc1"], aggregate="mean")
print(scores)
for scorer in (firing_rate, largest_weight, xe.LRP("epsilon-plus", initial="one"), xe.Random()):
    edit = xe.RelevancePruning(0.5, scorer=scorer).plan(model, loader)
    with edit.applied(model):
        accuracy = xe.evaluate_groups(model, test.batches).average
    print(f"{edit.origin['scorer']:<40} accuracy {accuracy:.3f} with half of the filters")
print(f"all filters: {xe.evaluate_groups(model, test.batches).average:.3f}")
