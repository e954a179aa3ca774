"""Two gloo processes with a sharded network, with a head on some ranks only, or with data on some ranks only."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from tolerances import assert_golden
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from two_processes import WORLD, results_of_ranks

from dnc_kernels import nn

C, K, D, STEPS = 3, 2, 8, 2

pytestmark = pytest.mark.usefixtures("one_thread")


def fully_shard(module):
    from torch.distributed.fsdp import fully_shard  # 8 s of CPU time: in the ranks alone

    return fully_shard(module, mesh=init_device_mesh("cpu", (WORLD,)))


def flattened(module, **options):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True, **options)


class Net(torch.nn.Module):
    def __init__(self, seed=0, **options):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = torch.nn.Conv2d(3, D, 1)
        self.head = nn.DNCHead(D, C, K, generator=torch.Generator().manual_seed(seed), **options)

    def forward(self, x, labels):
        return self.head.loss(self.backbone(x), labels)


def batch(step, rank, size=2):
    g = torch.Generator().manual_seed(10 * step + rank)
    labels = torch.randint(0, C, (size, 4, 4), generator=g)
    x = torch.randn(C, 3, generator=torch.Generator().manual_seed(9))[labels] + 0.2 * torch.randn(size, 4, 4, 3, generator=g)
    return x.movedim(-1, 1), labels


def batch_of_all(step):
    return tuple(map(torch.cat, zip(*(batch(step, rank) for rank in range(WORLD)), strict=True)))


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def run(net, data, model=None):
    """Train; losses (averaged over the ranks by `result`), sub-centroids and parameters."""
    model = net if model is None else model
    losses = []
    for step in range(STEPS):
        loss = model(*data(step)).loss
        loss.backward()
        with torch.no_grad():  # an optimizer would import the compiler
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(0.1 * p.grad)
                    p.grad = None
        losses.append(loss.detach())
    return {"loss": torch.stack(losses), "prototypes": net.head.prototypes.clone()}


def result(record, parameters=()):
    dist.all_reduce(record["loss"])
    record["loss"] /= WORLD
    return record | {name: whole(p).detach().clone() for name, p in parameters}


def sharded_network(rank):
    """The ranks start with sub-centroids of their own, which nobody but the head brings together."""
    net = fully_shard(Net(seed=rank))
    return result(run(net, lambda step: batch(step, rank)), net.named_parameters())


def flattened_network(rank):
    net = Net()
    model = flattened(net)
    record = run(net, lambda step: batch(step, rank), model)
    with type(model).summon_full_params(model):
        return result(record, net.named_parameters())


def flattened_in_half_precision(rank):
    from torch.distributed.fsdp import MixedPrecision

    net, half = Net(), torch.bfloat16
    policy = MixedPrecision(param_dtype=half, reduce_dtype=half, buffer_dtype=half)
    record = run(net, lambda step: batch(step, rank), flattened(net, mixed_precision=policy))
    return result(record) | {"wins": net.head.wins.clone()}


def sharded_head(rank):
    """Every method that needs parameters finds them whole."""
    record, x, labels = {}, *batch(0, rank)
    features = torch.cat([x, x, x[:, :2]], 1)
    for name, head in (("scale", Net().head), ("norm", Net(scores="norm").head), ("none", Net(checkpoint="none").head)):
        plain = copy.deepcopy(head)
        plain.sync = "none"
        fully_shard(head)
        mine = features.clone().requires_grad_()
        loss = head.loss(mine, labels).loss
        loss.backward()
        record[name] = result({"loss": loss.detach().clone(), "prototypes": head.prototypes.clone()})
        record[name]["gradient"] = whole(head.feat_norm.weight.grad).clone()
        head.eval(), plain.eval()
        plain.prototypes.copy_(head.prototypes)
        assert torch.equal(head.predict(features, 8), plain.predict(features, 8))
        assert torch.equal(head.explain(features).label, plain.explain(features).label)
        assert torch.equal(head.embed(features), plain.embed(features)) and torch.equal(head(features), plain(features))
        head.diagnose(features, labels), head.initialize_from_(features, labels), head.refit_(features, labels)
    classifier = fully_shard(nn.DNCClassifier(D, C, K))
    rows = features.movedim(1, -1).flatten(0, 2)
    classifier.loss(rows, labels.flatten()).loss.backward()
    assert classifier.feat_norm.weight.grad is not None and classifier.predict(rows).shape == (len(rows),)
    return record


def deferred(rank):
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    with torch.device("meta"):
        net = Net(class_weight=[1.0, 2.0, 3.0], accumulation_steps=2)
    fully_shard(net)
    net.to_empty(device="cpu")
    torch.manual_seed(rank)
    net.head.generator = None
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    net(*batch(0, rank)).loss.backward()
    state = get_model_state_dict(net)
    twin = fully_shard(Net(class_weight=[1.0, 2.0, 3.0], accumulation_steps=2))
    set_model_state_dict(twin, state)
    for some in (net, twin):
        some(*batch(1, rank))
    assert int(net.head.num_updates) == int(twin.head.num_updates) == 1
    assert torch.equal(net.head.prototypes, twin.head.prototypes)
    return {"prototypes": net.head.prototypes.clone(), "scale": whole(net.head.logit_scale).detach().clone()}


def head_of_a_stage(rank):
    """Rank 0 is a stage without a head. Rank 1 computes the loss alone and sends the gradient back."""
    group = dist.new_group([1])
    net, (x, labels) = Net(), batch(0, 0)
    features = net.backbone(x).detach().contiguous()
    if rank == 0:
        dist.send(features, 1)
        grad = torch.empty_like(features)
        dist.recv(grad, 1)
        return {"grad": grad}
    received = torch.empty_like(features)
    dist.recv(received, 0)
    received.requires_grad_()
    head = Net(process_group=group).head
    head.loss(received, labels).loss.backward()
    dist.send(received.grad.contiguous(), 0)
    classifier = nn.DNCClassifier(D, C, K, process_group=group)
    classifier.loss(*rows_of(x, labels))
    for method in (head.initialize_from_, head.refit_, head.diagnose):
        method(received.detach(), labels)
    assert copy.deepcopy(head).process_group is group
    assert pickle.loads(pickle.dumps(head)).process_group is None
    assert not any("group" in name for name in head.state_dict())
    return {"grad": received.grad}


def rows_of(x, labels):
    return torch.cat([x, x, x[:, :2]], 1).movedim(1, -1).flatten(0, 2), labels.flatten()


def not_a_member(rank):
    groups = [dist.new_group([0]), dist.new_group([1])]
    try:
        Net(process_group=groups[1 - rank])(*batch(0, 0))
    except RuntimeError as error:
        return str(error)
    return ""


def another_group(rank):
    group = dist.new_group([1, 0])
    net = Net(process_group=group)
    record = result(run(net, lambda step: batch(step, rank), DistributedDataParallel(net)))
    classifier = nn.DNCClassifier(D, C, K, process_group=group, assignment="gumbel")
    classifier.loss(*rows_of(*batch(0, rank)))
    return record | {"rows": classifier.prototypes.clone(), "memory": classifier.memory.storage.clone()}


def nothing_on_one_rank(rank):
    """An empty batch for a rank whose data have ended."""
    record = {}
    for name, options in (("all", {}), ("none", {"checkpoint": "none"}), ("data", {"init": "data"})):
        net = Net(**options)
        x, labels = batch(0, 0, size=0 if rank == 0 else 2)
        loss = net(x, labels).loss
        loss.backward()
        record[name] = {"loss": loss.detach(), "prototypes": net.head.prototypes.clone()}
        if rank == 0:
            assert loss == 0 and not net.backbone.weight.grad.any()
    torch.manual_seed(0)
    classifier = nn.DNCClassifier(D, C, K)
    classifier.loss(*rows_of(*batch(0, 0, size=0 if rank == 0 else 2))).loss.backward()
    return record | {"classifier": {"prototypes": classifier.prototypes.clone(), "memory": classifier.memory.storage.clone()}}


def data_that_end_early(rank):
    net, done = Net(), 0
    model = DistributedDataParallel(net)
    try:
        with model.join(throw_on_early_termination=True):
            for step in range(1 + rank):
                model(*batch(step, rank)).loss.backward()
                done += 1
    except RuntimeError as error:
        return {"done": done, "text": str(error), "prototypes": net.head.prototypes.clone()}
    return {"done": done, "text": ""}


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        sharded_network, flattened_network, flattened_in_half_precision, sharded_head, deferred, head_of_a_stage, not_a_member,
        another_group, nothing_on_one_rank, data_that_end_early,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return results_of_ranks(__name__, tmp_path_factory.mktemp("ranks"))


def expected_of_all(parameters=False):
    net = Net()
    record = run(net, batch_of_all)
    return record | ({name: p.detach() for name, p in net.named_parameters()} if parameters else {})


def assert_same(actual, expected):
    for key, value in expected.items():
        assert_golden(actual[key], value, "loss" if key == "loss" else "value")


@pytest.mark.parametrize("name", ["sharded_network", "flattened_network", "another_group"])
def test_sharded_networks_train_as_one_process(ranks, name):
    a, b = (r[name] for r in ranks)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert_same(a, expected_of_all(parameters=name != "another_group"))


def test_sub_centroids_stay_in_float32_under_a_buffer_dtype(ranks):
    a, b = (r["flattened_in_half_precision"] for r in ranks)
    assert a["prototypes"].dtype == a["wins"].dtype == torch.float32
    assert torch.equal(a["prototypes"], b["prototypes"])
    cosine = (a["prototypes"] * expected_of_all()["prototypes"]).sum(2)
    assert cosine.min() > 0.99
    assert not torch.equal(a["prototypes"], a["prototypes"].bfloat16().float())


@pytest.mark.parametrize("name, options", [("scale", {}), ("norm", {"scores": "norm"}), ("none", {"checkpoint": "none"})])
def test_a_head_that_is_sharded_alone_trains_by_loss(ranks, name, options):
    head = Net(**options).head
    x, labels = batch_of_all(0)
    result = head.loss(torch.cat([x, x, x[:, :2]], 1), labels)
    result.loss.backward()
    expected = {"loss": result.loss.detach(), "prototypes": head.prototypes, "gradient": head.feat_norm.weight.grad}
    assert_same(ranks[0]["sharded_head"][name], expected)
    assert torch.equal(ranks[1]["sharded_head"][name]["prototypes"], ranks[0]["sharded_head"][name]["prototypes"])


def test_a_network_that_is_sharded_on_the_meta_device_starts_alike_on_all_ranks(ranks):
    a, b = (r["deferred"] for r in ranks)
    assert torch.equal(a["prototypes"], b["prototypes"])
    assert float(a["scale"]) == pytest.approx(2.302585)


def test_a_head_of_one_stage_waits_for_no_other(ranks):
    net = Net()
    x, labels = batch(0, 0)
    features = net.backbone(x).detach().requires_grad_()
    net.head.loss(features, labels).loss.backward()
    for r in ranks:
        assert_golden(r["head_of_a_stage"]["grad"], features.grad, "gradient")


def test_a_head_of_a_group_that_the_rank_is_not_in_says_so(ranks):
    assert all("process_group must be a group that this rank is in" in r["not_a_member"] for r in ranks)


@pytest.mark.parametrize("name, options", [("all", {}), ("none", {"checkpoint": "none"}), ("data", {"init": "data"})])
def test_a_rank_with_an_empty_batch_adds_nothing(ranks, name, options):
    net = Net(**options)
    loss = net(*batch(0, 0)).loss.detach()
    for r in ranks:
        assert_golden(r["nothing_on_one_rank"][name]["prototypes"], net.head.prototypes, "value")
    assert_golden(ranks[1]["nothing_on_one_rank"][name]["loss"] / WORLD, loss, "loss")


def test_a_rank_with_an_empty_batch_of_rows_adds_nothing(ranks):
    torch.manual_seed(0)
    classifier = nn.DNCClassifier(D, C, K)
    classifier.loss(*rows_of(*batch(0, 0)))
    for r in ranks:
        assert_golden(r["nothing_on_one_rank"]["classifier"]["prototypes"], classifier.prototypes, "value")
        assert_golden(r["nothing_on_one_rank"]["classifier"]["memory"], classifier.memory.storage, "value")


def test_ranks_stop_together_when_the_data_of_one_end(ranks):
    a, b = (r["data_that_end_early"] for r in ranks)
    assert a["done"] == b["done"] == 1 and a["text"] and b["text"]
    assert torch.equal(a["prototypes"], b["prototypes"])
