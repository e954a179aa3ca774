"""What a head knows survives every way in which weights arrive, and nothing else does."""

import copy
import pickle

import numpy as np
import pytest
import torch
from tolerances import assert_close

from dnc_kernels import nn

C, K, D = 4, 3, 8
WEIGHT = [1.0, 2.0, 3.0, 4.0]
COUNTERS = ("num_updates", "last_counts", "idle_updates", "wins", "class_counts", "nonfinite_pixels", "bad_labels")
HEADS = ("segmentation", "classification")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def filled_memory():
    """Empty memory reads as NaN and as the largest integers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(kind="segmentation", **options):
    options = {"momentum": 0.5, "class_weight": WEIGHT, **options}
    return nn.DNCHead(D, C, K, **options) if kind == "segmentation" else nn.DNCClassifier(D, C, K, memory_size=3, **options)


def batch(kind="segmentation", number=0):
    g = torch.Generator().manual_seed(number)
    shape = (2, 4, 4) if kind == "segmentation" else (32,)
    labels = torch.randint(0, C, shape, generator=g)
    x = torch.randn(C, D, generator=torch.Generator().manual_seed(99))[labels] + 0.1 * torch.randn(*shape, D, generator=g)
    return (x.movedim(-1, 1) if kind == "segmentation" else x), labels


def train(head, kind="segmentation", numbers=range(2)):
    for number in numbers:
        head.loss(*batch(kind, number))
    return head


def replaced_one_by_one(head, state):
    """As `from_pretrained` of transformers: by setattr, and empty memory for what the state dict lacks."""
    for prefix, module in head.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            value = state.get(f"{prefix}.{name}".lstrip("."), torch.empty_like(tensor, device="cpu")).clone()
            setattr(module, name, torch.nn.Parameter(value) if isinstance(tensor, torch.nn.Parameter) else value)


def put_into_the_dictionaries(head, state):
    """As accelerate: past `__setattr__`."""
    for name, value in state.items():
        prefix, _, last = name.rpartition(".")
        module = head.get_submodule(prefix)
        if last in module._parameters:
            module._parameters[last] = torch.nn.Parameter(value.clone())
        else:
            module._buffers[last] = value.clone()


def on_meta(kind, **options):
    with torch.device("meta"):
        head = make(kind, **options)
    assert all(t.is_meta for t in [*head.parameters(), *head.buffers()])
    return head


def loaded(how, kind, state, **options):
    state = copy.deepcopy(state)
    if how == "built":
        head = make(kind, **options)
        head.load_state_dict(state)
    elif how == "dictionaries":
        head = make(kind, **options)
        put_into_the_dictionaries(head, state)
    else:
        head = on_meta(kind, **options)
        if how == "to_empty":
            head.to_empty(device="cpu").load_state_dict(state)
        elif how == "assign":
            head.load_state_dict(state, assign=True)
        else:
            replaced_one_by_one(head, state)
    return head


WAYS = ("built", "to_empty", "assign", "one_by_one", "dictionaries")


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("how", WAYS)
def test_a_head_goes_on_from_its_state_however_that_arrives(how, kind, filled_memory):
    source = train(make(kind, init="data"), kind)
    head = loaded(how, kind, source.state_dict(), init="data")
    assert all(not t.is_meta for t in [*head.parameters(), *head.buffers()])
    for name in COUNTERS:
        expected = source.num_updates if name == "num_updates" else torch.zeros_like(getattr(source, name))
        assert torch.equal(getattr(head, name), expected), name
    assert head.class_weight.tolist() == WEIGHT
    for a, b in zip(source.loss(*batch(kind, 5)), head.loss(*batch(kind, 5)), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(source.prototypes, head.prototypes)


@pytest.mark.parametrize("how", WAYS)
def test_sub_centroids_of_a_checkpoint_without_counters_are_not_started_over(how, filled_memory):
    state = {name: value for name, value in make().state_dict().items() if name not in ("num_updates", "start_in")}
    head = loaded(how, "segmentation", state, init="data", momentum=1.0)
    train(head)
    assert_close(head.prototypes, state["prototypes"].double(), "direction", terms=D)
    assert not head._start_pending and int(head.start_in) == 0


@pytest.mark.parametrize("how", WAYS)
def test_a_start_that_is_to_come_comes(how, filled_memory):
    options = {"init": "data", "init_step": 2, "generator": torch.Generator().manual_seed(1)}
    source = train(make(**options), numbers=[0])
    head = loaded(how, "segmentation", source.state_dict(), **options)
    head.generator = source.generator.clone_state()
    train(source, numbers=[1, 2])
    train(head, numbers=[1, 2])
    assert int(head.start_in) == 0 and torch.equal(head.prototypes, source.prototypes)


@pytest.mark.parametrize("end", ["initialize_from_", "refit_", "anchored"])
def test_a_start_by_hand_is_the_only_one(end):
    source = make(init="data", momentum=1.0)
    if end == "anchored":
        source._forget_pending(start=True)
    else:
        getattr(source, end)(*batch())
    head = make(init="data", momentum=1.0)
    head.load_state_dict(source.state_dict())
    for some in (source, head, copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        before = some.prototypes.clone()
        train(some)
        assert_close(some.prototypes, before.double(), "direction", terms=D)


def test_moving_a_head_does_not_cancel_its_start():
    head = make(init="data", momentum=1.0)
    before = head.prototypes.clone()
    train(copy.deepcopy(head.half().float()).requires_grad_(False), numbers=[0])
    moved = pickle.loads(pickle.dumps(head.double()))
    x, labels = batch()
    moved.loss(x.double(), labels)
    assert (moved.prototypes - before).abs().max() > 0.1


@pytest.mark.parametrize("kind", HEADS)
def test_resuming_inside_an_accumulation_is_exact(kind, tmp_path):
    source = train(make(kind, accumulation_steps=3, init="data"), kind)
    torch.save(source.state_dict(), tmp_path / "head.pt")
    head = make(kind, accumulation_steps=3, init="data")
    head.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    for number in range(2, 6):
        train(source, kind, [number])
        train(head, kind, [number])
        assert torch.equal(head.prototypes, source.prototypes)
    assert int(source.num_updates) == 2
    assert not any("accumulated" in name for name in source.state_dict())


def test_a_state_inside_an_accumulation_loads_without_one():
    state = train(make(accumulation_steps=3)).state_dict()
    head = make()
    head.load_state_dict(state)
    assert head._pending is None


def test_checkpoints_with_a_scale_without_a_dimension_load():
    state = make().state_dict()
    state["logit_scale"] = torch.tensor(1.5)
    head = make()
    head.load_state_dict(state)
    assert head.logit_scale.shape == (1,) and head.logit_scale.item() == 1.5
    assert head.logit_temperature().shape == ()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("scores", ["scale", "norm"])
def test_reset_parameters_makes_a_head_new(kind, scores, filled_memory):
    options = {"scores": scores, "generator": torch.Generator().manual_seed(3), "init": "data", "accumulation_steps": 2}
    new = make(kind, **options)
    used = train(make(kind, **options), kind, range(3))
    with torch.no_grad():
        for p in used.parameters():
            p.add_(1)
    empty = on_meta(kind, **options).to_empty(device="cpu")
    for head in (used, empty):
        head.generator = torch.Generator().manual_seed(3)
        head.reset_parameters()
        assert head._start_pending and head._pending is None
        expected = dict([*new.named_parameters(), *new.named_buffers()])
        actual = dict([*head.named_parameters(), *head.named_buffers()])
        assert all(torch.equal(actual[name], value) for name, value in expected.items())
    # what FSDP and torchtitan call: module by module
    for module in (m for m in empty.modules() if hasattr(m, "reset_parameters")):
        module.reset_parameters()
    train(empty, kind)
    assert empty.prototypes.isfinite().all()


def test_a_projection_is_reset_too():
    head = nn.DNCHead(D, C, K, embed_channels=4)
    head.projection.weight.data.fill_(7)
    head.reset_parameters()
    assert head.projection.weight.abs().max() < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_class_weights_stay_in_float32(dtype):
    weight = [1e-9, 2.5e5, 3.3, 1.0]
    head = make(class_weight=weight, ppc_weight=0.0, ppd_weight=0.0)
    x, labels = batch()
    half = copy.deepcopy(head).to(dtype)
    expected = copy.deepcopy(half).double().loss(x.to(dtype).double(), labels, update=False).loss
    assert half.class_weight.dtype == torch.float32
    loss = half.loss(x.to(dtype), labels, update=False).loss
    assert_close(loss.detach().to(dtype), expected.detach(), "head", terms=D)  # the embedding is rounded to the features' dtype
    assert torch.equal(copy.deepcopy(half).double().class_weight, head.class_weight.double())


def test_class_weights_are_checked_when_set():
    head = make()
    head.class_weight = torch.ones(C, dtype=torch.float64)
    assert head.class_weight.dtype == torch.float32
    head.class_weight = np.ones(C)
    with pytest.raises(ValueError, match=r"class_weight must be \[C\]=\[4\]"):
        head.class_weight = [1.0]
    with pytest.raises(ValueError, match="class_weight must be without a gradient"):
        make(class_weight=torch.ones(C, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "init, momentum",
    [("random", 0.999), ("orthogonal", (0.9, 0.999, 7)), ("data", nn.Recent(0.5, 0.9)), ("random", lambda n: 0.999)],
)
def test_another_default_dtype_changes_no_number(dtype, init, momentum):
    plain = make(dtype=torch.float32, init=init, momentum=momentum, generator=torch.Generator().manual_seed(2))
    x, labels = batch()
    torch.set_default_dtype(dtype)
    try:
        head = make(dtype=torch.float32, init=init, momentum=momentum, generator=torch.Generator().manual_seed(2))
        assert head.feat_norm.weight.dtype == torch.float32 and make().feat_norm.weight.dtype == dtype
        assert nn.FeatureMemory(C, 2, D).storage.dtype == make().prototypes.dtype == torch.float32
        results = [head.loss(x, labels) for _ in range(2)]
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(results[1], [plain.loss(x, labels) for _ in range(2)][1], strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    assert torch.equal(head.prototypes, plain.prototypes)


def test_constructors_take_numbers_of_numpy():
    n = np.int64
    for module in (
        nn.DNCHead(n(D), n(C), n(K), n(4), ignore_index=n(255), band_pixels=n(16), pixels_per_class=n(2), init_step=n(1)),
        nn.DNCClassifier(n(D), n(C), n(K), n(2), warmup_steps=n(1), revive_after=n(3), accumulation_steps=n(2)),
        nn.SubCentroids(n(C), n(K), n(D), iterations=n(2), epsilon=np.float32(0.05)),
        nn.FeatureMemory(n(C), n(K), n(D)),
        nn.NearestSamples(make(), n(2)),
        nn.Monitor(make(), every=n(2)),
    ):
        assert module is not None
    head = make(momentum=np.float32(0.5), ppc_weight=np.float32(0.1), temperature=np.float64(0.1), scores="temperature")
    assert "num_updates" not in head.state_dict()
    train(head)


def test_half_precision_that_arrives_from_outside_is_widened():
    head = make()
    rows = head.prototypes.bfloat16()
    head.prototypes = rows
    assert head.prototypes.dtype == torch.float32
    assert_close(head.prototypes.norm(dim=2), torch.ones(C, K, dtype=torch.float64), "direction", terms=D)
    head = make()
    head.prototypes.data, head.wins.data = rows, head.wins.bfloat16()  # as FullyShardedDataParallel casts
    train(head)
    assert head.prototypes.dtype == head.wins.dtype == torch.float32
