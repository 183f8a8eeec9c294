"""The head: the affine map that the logits are, found by data flow, proven, and edited."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, normalize, silu
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import xai_edit as xe
from xai_edit.core.outputs import as_logits, tensor_of
from xai_edit.last_layer.head import collect_head_features

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:data")

C, D = 3, 5


class Ends(nn.Module):
    """A body, and a head that is a function of the model, its modules, and the features."""

    def __init__(self, head, **modules):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, D), nn.Tanh())
        self.head = head
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.head(self, self.body(x))


class Maps(nn.Module):
    """Maps (n, 4, 2, 2) and what follows them."""

    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, (1, 2)), nn.Tanh())
        self.head = nn.Sequential(*layers)

    def forward(self, x):
        return self.head(self.body(x.reshape(-1, 1, 2, 3)))


class Cubed(nn.Module):
    """A parametrization with an inverse."""

    def forward(self, w):
        return w.pow(3)

    def right_inverse(self, w):
        return w.sign() * w.abs().pow(1 / 3)


class Returned(dict):
    """What a Hugging Face model returns."""

    __getattr__ = dict.__getitem__


def fc(layer):
    return Ends(lambda m, h: m.fc(h), fc=layer)


def then(function, *, classes=C, **options):
    return Ends(lambda m, h: function(m.fc(h)), fc=nn.Linear(D, classes, **options))


def stored(head, **shapes):
    return Ends(head, **{name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})


def two(head, width=D):
    return Ends(head, one=nn.Linear(D, C), two=nn.Linear(width, C, bias=width == D))


def both(h):
    return torch.stack([h, h.sin()], 1)


def conv(kernel=1):
    return nn.Conv2d(4, C, kernel)


def pool():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def negative(layer):
    with torch.no_grad():
        layer.weight_g[0] *= -1
    return layer


def parametrized(layer, kind):
    parametrize.register_parametrization(layer, "weight", kind)
    return layer


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def class_embeddings(m, h):
    return 100 * normalize(h, dim=-1) @ m.w.T


def overwritten(head, change):
    """A head whose input is overwritten in place after it ran."""

    def output(m, h):
        h = h - 0.1
        z = head(m, h)
        change(h)
        return z

    return output


def assign_zero(h):
    h[:] = 0


SUPPORTED = {
    "input rectified afterwards": lambda: Ends(
        overwritten(lambda m, h: m.fc(h), torch.relu_), fc=nn.Linear(D, C)
    ),
    "input assigned to afterwards": lambda: Ends(
        overwritten(lambda m, h: m.fc(h), assign_zero), fc=nn.Linear(D, C)
    ),
    "a token, overwritten afterwards": lambda: Ends(
        overwritten(lambda m, h: m.fc(torch.stack([h, h], 1).view(-1, 2, D))[:, 1], torch.relu_),
        fc=nn.Linear(D, C),
    ),
    "views of the input, overwritten afterwards": lambda: Ends(
        overwritten(
            lambda m, h: m.fc(h[:, :, None, None]).flatten(1), lambda h: silu(h, inplace=True)
        ),
        fc=nn.Conv2d(D, C, 1),
    ),
    "linear": lambda: fc(nn.Linear(D, C)),
    "no bias": lambda: fc(nn.Linear(D, C, bias=False)),
    "the whole model": lambda: nn.Linear(6, C),
    "dropout": lambda: fc(nn.Sequential(nn.Linear(D, C), nn.Dropout(0.5))),
    "times": lambda: then(lambda z: z.mul_(2)),
    "minus, divided": lambda: then(lambda z: -z / 4),
    "output object": lambda: then(lambda z: Returned(loss=None, logits=z)),
    "temperature": lambda: Ends(
        lambda m, h: m.fc(h) * m.t.exp(), fc=nn.Linear(D, C), t=nn.Parameter(torch.ones(()))
    ),
    "pool, conv": lambda: Maps(nn.AdaptiveAvgPool2d(1), conv(), nn.Flatten()),
    "conv, pool": lambda: Maps(conv(), pool()),
    "conv, positions in a row": lambda: Ends(
        lambda m, h: m.fc(h[..., None, None].expand(-1, -1, 2, 2)).view(len(h), C, 4).mean(2),
        fc=nn.Conv2d(D, C, 1),
    ),
    "conv of the whole map": lambda: Maps(conv(2), nn.Flatten()),
    "one token": lambda: Ends(lambda m, h: m.fc(both(h))[:, 1], fc=nn.Linear(D, C)),
    "a token of each": lambda: Ends(
        lambda m, h: m.fc(both(h))[torch.arange(len(h)), (h[:, 0] > 0).long()], fc=nn.Linear(D, C)
    ),
    "mean of tokens": lambda: Ends(lambda m, h: m.fc(both(h)).mean(1), fc=nn.Linear(D, C)),
    "weight norm": lambda: fc(weight_norm(nn.Linear(D, C))),
    "weight norm, negative": lambda: fc(negative(weight_norm(nn.Linear(D, C)))),
    "weight norm of all": lambda: fc(weight_norm(nn.Linear(D, C), dim=None)),
    "weight norm, new": lambda: fc(parametrizations.weight_norm(nn.Linear(D, C))),
    "parametrization": lambda: fc(parametrized(nn.Linear(D, C), Cubed())),
    "equalised rate": lambda: stored(lambda m, h: linear(h, m.w * 0.3, m.b * 2), w=(C, D), b=C),
    "transposed": lambda: stored(lambda m, h: h @ m.w + m.b, w=(D, C), b=C),
    "transposed, square": lambda: stored(lambda m, h: torch.addmm(m.b, h, m.w), w=(D, D), b=D),
    "class embeddings": lambda: stored(class_embeddings, w=(C, D)),
    "two heads": lambda: two(lambda m, h: (m.one(h) + m.two(h.sin())) / 2),
    "two widths": lambda: two(lambda m, h: m.one(h) + m.two(h[:, :4]), 4),
    "mean of a stack": lambda: two(lambda m, h: torch.stack([m.one(h), m.two(h.sin())]).mean(0)),
    "one head twice": lambda: two(lambda m, h: m.one(h) + m.one(h.sin())),
    "one output": lambda: fc(nn.Linear(D, 1)),
    "compiled": lambda: torch.compile(fc(nn.Linear(D, C)), backend="eager"),
    "compiled inside": lambda: nn.Sequential(torch.compile(fc(nn.Linear(D, C)), backend="eager")),
    "compiled in place": lambda: compiled_in_place(fc(nn.Linear(D, C))),
    "data parallel": lambda: nn.DataParallel(fc(nn.Linear(D, C))),
}


def sigmoid_unused(z):
    z.sigmoid_()
    return z


# The output of these is a function of the logits.
FINAL = {
    "softmax": (lambda: then(nn.Softmax(1)), lambda z: z.softmax(1)),
    "sigmoid in place": (lambda: then(torch.sigmoid_), torch.sigmoid),
    "sigmoid in place, result unused": (lambda: then(sigmoid_unused), torch.sigmoid),
    "log softmax": (lambda: then(nn.LogSoftmax(-1)), lambda z: z.log_softmax(1)),
    "sigmoid": (lambda: then(torch.sigmoid), torch.sigmoid),
    "one sigmoid": (
        lambda: then(lambda z: z.squeeze(-1).sigmoid(), classes=1),
        lambda z: z.softmax(1) * torch.tensor([0, 1]),
    ),
}
CASES = {name: (make, lambda z: z) for name, make in SUPPORTED.items()} | FINAL


def samples(n=8):
    return torch.randn(n, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def made(make):
    torch.manual_seed(0)
    return make().double().eval()


@pytest.mark.parametrize("name", CASES)
def test_features_and_edits_of_them_give_the_models_logits(name, unchanged):
    make, final = CASES[name]
    model, x = made(make), samples()
    check = unchanged(model)
    head = collect_head_features(model, [x[:5], x[5:]])
    check()

    def agrees(head):
        outputs = as_logits(tensor_of(model(x))).detach()
        torch.testing.assert_close(final(head.logits()), outputs, rtol=1e-9, atol=1e-9)

    agrees(head)
    weight = head.weight.double().clone()
    weight[1, 2] += 3
    weight[0] = 0.0  # as a row that is switched off
    bias = None if head.bias is None else head.bias.double() + torch.arange(head.classes)
    edit = head.edit(model, {}, weight=weight, bias=bias)
    check()
    edited = head.edited(edit)
    if not head.one_output:
        torch.testing.assert_close(edited.weight, weight, rtol=1e-9, atol=1e-9)
    with edit.applied(model):
        agrees(edited)
        agrees(collect_head_features(model, [x]))
    check()


def masked():
    layer = nn.Linear(D, C)
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


def hooked(hook):
    layer = nn.Linear(D, C)
    layer.register_forward_hook(hook)
    return layer


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter."""

    def __init__(self):
        super().__init__()
        self.base_layer, self.lora_A = nn.Linear(D, C), nn.Linear(D, 2, bias=False)
        self.lora_B = nn.Linear(2, C, bias=False)

    def forward(self, x):
        return self.base_layer(x) + 0.5 * self.lora_B(self.lora_A(x))


def cosine(m, h):
    return 10 * linear(normalize(h), normalize(m.w))


def by_a_norm(m, h):
    return linear(h, m.w / m.w.norm())


REFUSED = {
    "none": (lambda: Maps(nn.Flatten()), "it has none"),
    "one number": (lambda: then(torch.sum), "a classifier gives one row of logits"),
    "relu": (lambda: then(nn.ReLU()), r"'fc', is followed by relu \(.*differ by up to"),
    "relu in place": (lambda: then(nn.ReLU(inplace=True)), "'fc'.*relu"),
    "some classes": (lambda: then(lambda z: z[:, :2]), "'fc'.*getitem"),
    "one is set": (lambda: then(lambda z: z.index_fill_(1, torch.tensor(0), 9)), "index_fill"),
    "squeezenet": (lambda: Maps(conv(), nn.ReLU(), pool()), r"'head.0'.*relu"),
    "max pool": (lambda: Maps(conv(), nn.AdaptiveMaxPool2d(1), nn.Flatten()), "'head.0'.*followed"),
    "cosine": (lambda: stored(cosine, w=(C, D)), "computed in each pass; its W x.*differ by up to"),
    "its own norm": (lambda: stored(by_a_norm, w=(C, D)), "change by .* with its own weight"),
    "masked": (lambda: fc(masked()), "'fc', is computed.*differ by up to.*prune.remove"),
    "spectral norm": (lambda: fc(spectral_norm(nn.Linear(D, C))), "own weight.*remove_spectral"),
    "spectral norm, new": (
        lambda: fc(parametrizations.spectral_norm(nn.Linear(D, C))),
        "'fc', its inputs x change by.*remove_parametrizations",
    ),
    "orthogonal": (
        lambda: fc(parametrizations.orthogonal(nn.Linear(D, C))),
        "parametrization _Orthogonal, which cannot.*remove_parametrizations.*'fc'",
    ),
    "hooked": (lambda: fc(hooked(lambda m, i, z: z.clamp(max=0.1))), "clamp.*differ.*has hooks"),
    "adapter": (lambda: fc(Adapted()), r"adapter of 2 inputs.*differ by.*merge_and_unload\(\)"),
    "in other places for other data": (
        lambda: two(lambda m, h: (m.one if len(h) == 3 else m.two)(h)),
        "'one', it is another one for other batches",
    ),
    "plus data": (lambda: two(lambda m, h: m.one(h) + h[:, :C]), "'one', is followed by add"),
    "plus a maximum over tokens": (  # as VOLO
        lambda: two(lambda m, h: m.one(h) + 0.5 * m.two(both(h)).max(1)[0]),
        "'one', is followed by add of the output of 'two' after max",
    ),
    "tied": (lambda: stored(lambda m, h: (h @ m.w).tanh() @ m.w.T, w=(D, D)), "another place"),
    "temperature of the data": (
        lambda: then(lambda z: z / z.norm(dim=1, keepdim=True)),
        "differ by up to|followed by div",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_heads_are_refused_by_what_differs(name, unchanged):
    make, reason = REFUSED[name]
    model = made(make)
    check = unchanged(model)
    with pytest.raises(ValueError, match=rf"(?s)^model: .*{reason}"):
        collect_head_features(model, [*samples(13).split(10)])
    check()


def test_an_edit_planned_on_a_wrapped_model_fits_the_plain_one():
    plain, x = made(SUPPORTED["linear"]), samples()
    data = [(x, plain(x).argmax(1))]
    edit = xe.SingleWeight().plan(nn.DataParallel(plain), data, target=int(data[0][1][0]))
    assert edit.changes.keys() <= {"fc.weight", "fc.bias"}
    edit.apply(torch.compile(plain, backend="eager"))
    edit.undo(plain)


@pytest.mark.parametrize("scope", ["neuron", "class_row"])
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        *(("conv, pool", "head.0:input"), ("weight norm", "body.0"), ("times", "body.0")),
        *(("compiled in place", "body.0"), ("one token", "fc:input")),
    ],
)
def test_path_perturbation_takes_what_feeds_the_head(name, layer, scope):
    model, x = made(SUPPORTED[name]), samples(40)
    target = int(model(x).argmax(1).mode().values)
    edit = xe.PathPerturbation(scope=scope, share=0.4).plan(model, [x], target=target)
    assert edit.origin["layer"] == layer
    head = collect_head_features(model, [x])
    off = head.features.clone()
    off[:, edit.origin["neurons"]] = 0
    expected = off @ head.weight.T + (0 if head.bias is None else head.bias)
    kept = torch.arange(head.classes) != target
    if scope == "class_row":
        expected[:, kept] = head.logits()[:, kept]
    with edit.applied(model):
        torch.testing.assert_close(model(x).detach(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["two heads", "class embeddings"])
def test_inputs_of_no_layer_are_no_default_for_path_perturbation(name):
    model, x = made(SUPPORTED[name]), samples(40)
    target = int(model(x).argmax(1).mode().values)
    with pytest.raises(
        ValueError, match=r"not one by one those.*hidden layer, with scope='neuron'"
    ):
        xe.PathPerturbation().plan(model, [x], target=target)
    with pytest.raises(
        ValueError, match=r"feed the output; for layer 'body.0' give scope='neuron'"
    ):
        xe.PathPerturbation(layer="body.0").plan(model, [x], target=target)
    edit = xe.PathPerturbation("body.0", scope="neuron").plan(model, [x], target=target)
    assert edit.changes.keys() == {"body.0.weight", "body.0.bias"}


def head_of_eight():
    return collect_head_features(made(lambda: nn.Linear(6, 3)), [(samples(), torch.arange(8) % 3)])


@pytest.mark.parametrize(
    "rows", [[7, 2], torch.tensor([7, 2]), torch.arange(8) == 3, slice(2, 5)], ids=str
)
def test_rows_of_features_are_those_of_a_mask_of_indices_or_of_a_slice(rows):
    head = head_of_eight()
    assert torch.equal(head[rows].features, head.features[rows])
    assert torch.equal(head[rows].labels, head.labels[rows])


@pytest.mark.parametrize("rows", [[[0.5]], [0.5], [[0]], 0, torch.ones(8)], ids=str)
def test_rows_that_are_no_mask_and_no_indices_are_refused(rows):
    with pytest.raises(TypeError, match=r"samples: torch\.\w+ of shape .* given; give a mask"):
        head_of_eight()[rows]


def test_features_are_shown_by_their_sizes():
    assert repr(head_of_eight()) == "HeadFeatures('': 8 samples, 6 features, 3 classes)"
