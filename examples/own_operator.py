# %% [markdown]
# # Write your own operator
#
# An operator plans an edit and changes nothing. This one turns down the units that are most
# relevant for a class, whatever the scorer. `check_operator` checks it, and a network that reads
# handwritten digits is edited with it.
#
#     python examples/own_operator.py

# %%
import argparse
from dataclasses import dataclass, field

import torch

import xai_edit as xe
from xai_edit.datasets.small_network import small_cnn, train
from xai_edit.datasets.watermarked_digits import WatermarkedDigits
from xai_edit.testing import check_operator

parser = argparse.ArgumentParser(description="An operator of one's own, checked and used.")
parser.add_argument("--quick", action="store_true", help="train for 3 epochs instead of 20")
arguments = parser.parse_args()


# %%
@dataclass(frozen=True)
class Dampen:
    """Multiply the outputs of the units that are most relevant for a class."""

    layer: str
    share: float = 0.2
    factor: float = 0.5
    scorer: xe.lrp.Scorer = field(default_factory=xe.LRP)

    def plan(self, model, data, *, target):
        scores = xe.score_units(model, data, self.scorer, layers=[self.layer], target=target)
        units = scores.top(self.layer, share=self.share)
        values = {}
        for name in (f"{self.layer}.weight", f"{self.layer}.bias"):
            old = model.get_parameter(name).detach().cpu()
            rows = torch.arange(old.numel()).reshape(len(old), -1)  # flat indices, a unit a row
            index = rows[units].flatten()
            values[name] = (index, old.flatten()[index] * self.factor)
        origin = {
            "operator": "Dampen",
            "layer": self.layer,
            "units": units.tolist(),
            "factor": self.factor,
            "target": target,
            "scorer": scores.origin["scorer"],
        }
        return xe.ModelEdit.between(model, values, origin)


check_operator(Dampen("fc1"))

# %% [markdown]
# Where `plan` needs more than a model, data and a class, say how it is called.

# %%
operator = Dampen("conv2", scorer=xe.Taylor())
check_operator(operator, lambda model, data: operator.plan(model, data, target=2))


# %% [markdown]
# What a check says when a promise is broken: this one writes where it should only read.


# %%
class Hasty:
    def plan(self, model, data):
        edit = Dampen("fc1").plan(model, data, target=0)
        return edit if edit.apply(model) else None


try:
    check_operator(Hasty())
except AssertionError as problem:
    print(problem)

# %% [markdown]
# ## Used like any other

# %%
digits = WatermarkedDigits(share=0.0)
training, validation, test = digits.split(seed=0)
torch.manual_seed(0)
model = small_cnn(digits.size)
train(model, training.images, training.labels, epochs=3 if arguments.quick else 20, seed=0)
threes = validation[validation.labels == 3].batches


# %%
def accuracies(model):
    """Return the accuracy on digit 3 and on the others."""
    is_three = test.labels == 3
    return [xe.evaluate_groups(model, test[part].batches).average for part in (is_three, ~is_three)]


print("digit 3 {:.3f}, others {:.3f}".format(*accuracies(model)))
for factor in (0.5, 0.25, 0.0):
    edit = Dampen("fc1", factor=factor).plan(model, threes, target=3)
    with edit.applied(model):
        found = "digit 3 {:.3f}, others {:.3f}".format(*accuracies(model))
    print(f"factor {factor:.2f}: {edit.size} weights, {found}")
