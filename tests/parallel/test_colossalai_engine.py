"""longreel.parallel.colossalai_engine: gradients and loss curves are those of fsdp2, checkpoints are everyone's."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longreel.bench import gate
from longreel.bench.cases import Point, Timing
from longreel.bench.grids import MeasuredGrid, measured_points
from longreel.bench.measure import RankResult, measure_points
from longreel.bench.presets import small_dit
from longreel.data.demo import make_demo_folder
from longreel.kernels.numerics import PARALLEL_TOLERANCE, gradient_errors, relative_error
from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.parallel.checkpoint import candidates, load_checkpoint
from longreel.parallel.checkpoint_writer import CheckpointWriter
from longreel.parallel.config import STRATEGIES, ParallelConfig, Policy
from longreel.parallel.launch import process_group
from longreel.parallel.mesh import build_mesh
from longreel.parallel.model_choice import ModelChoice
from longreel.parallel.parallelize import Batch, ParallelDiT
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.trainer import Trainer

installed = pytest.mark.skipif(
    importlib.util.find_spec("colossalai") is None, reason="ColossalAI is not installed: make setup-colossalai"
)

# 15 video tokens, no multiple of 2; the last bias has 9 elements, no multiple of 2 or 4.
LATENT_SHAPE = (1, 9, 5, 3)
CONFIG = DiTConfig(
    depth=2,
    hidden_size=32,
    num_heads=4,
    mlp_ratio=2.0,
    in_channels=3,
    patch_size=(1, 3, 1),
    conditioning="cross",
    text_dim=10,
    max_text_tokens=6,
)
SPREADS = [("ulysses", 1), ("ulysses", 2), ("fastseq", 1), ("fastseq", 2)]
SPREAD_IDS = [f"{strategy}-P2-dp{dp}" for strategy, dp in SPREADS]


def use_cpu_accelerator() -> None:
    import cpu_accelerator

    cpu_accelerator.use()


def build(parallel: ParallelConfig, *, learning_rate: float = 1e-3, seed: int = 0, device: str = "cpu") -> ParallelDiT:
    """A model with nothing left at zero, its optimizer attached."""
    if parallel.engine == "colossalai" and device == "cpu":
        use_cpu_accelerator()
    torch.manual_seed(seed)
    model = DiT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    mesh = build_mesh(sp_degree=parallel.sp_degree, ulysses_degree=parallel.ulysses_degree, device_type=device)
    spread = ParallelDiT(model.to(device), mesh, parallel)
    spread.engine.attach(torch.optim.AdamW(spread.parameters(), lr=learning_rate))
    return spread


def batch(spread: ParallelDiT, step: int) -> Batch:
    """Two samples of a step: both on the one dp rank, or one on each of two."""
    torch.manual_seed(100 + step)
    to = {"dtype": spread.loss_dtype, "device": spread.mesh.flat.device_type}
    whole = {
        "latents": torch.randn(2, *LATENT_SHAPE),
        "noise": torch.randn(2, *LATENT_SHAPE),
        "timestep": torch.rand(2),
        "text": torch.randn(2, 6, 10),
    }
    each = 2 // spread.mesh.dp_degree
    first = spread.mesh.dp_rank * each
    return Batch(**{k: v[first : first + each].to(**to) for k, v in whole.items()}, global_samples=2)


def total(loss: Tensor) -> float:
    mean = loss.detach().double() / dist.get_world_size()
    dist.all_reduce(mean)
    return mean.item()


def train_steps(spread: ParallelDiT, first: int, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        loss = spread.loss(batch(spread, step))
        spread.engine.backward(loss)
        spread.engine.step()
        losses.append(total(loss))
    return losses


def one_step(parallel: ParallelConfig) -> tuple[float, dict[str, Tensor]]:
    spread = build(parallel)
    loss = spread.loss(batch(spread, 0))
    spread.engine.backward(loss)
    return total(loss), {name: grad.clone() for name, grad in spread.engine.full_gradients().items()}


def curve(parallel: ParallelConfig, steps: int, device: str = "cpu") -> list[float]:
    return train_steps(build(parallel, device=device), 0, steps)


def gradient_cases() -> list[Any]:
    """Every strategy, dp, precision and policy; by default the two plain strategies, each with each precision."""
    cases = []
    for strategy, dp, precision, policy in itertools.product(
        STRATEGIES[1:], (1, 2), ("fp32", "fp64"), get_args(Policy)
    ):
        quick = strategy in ("ulysses", "fastseq") and policy == {"fp32": "none", "fp64": "keep_attention"}[precision]
        marks = () if quick else pytest.mark.slow
        cases.append(
            pytest.param(strategy, dp, precision, policy, id=f"{strategy}-P2-dp{dp}-{precision}-{policy}", marks=marks)
        )
    return cases


@installed
@pytest.mark.parametrize(("strategy", "dp", "precision", "policy"), gradient_cases())
def test_gradients_equal_those_of_fsdp2_and_of_one_device(
    run_distributed: Any, strategy: Any, dp: int, precision: Any, policy: Any
) -> None:
    parallel = ParallelConfig(
        strategy=strategy,
        sp_degree=2,
        ulysses_degree=1 if strategy == "usp" else None,
        engine="colossalai",
        precision=precision,
        policy=policy,
    )
    tolerance = PARALLEL_TOLERANCE[torch.float64 if precision == "fp64" else torch.float32]
    one = run_distributed(one_step, 1, ParallelConfig(precision=precision))[0]
    fsdp2 = run_distributed(one_step, 2 * dp, replace(parallel, engine="fsdp2-zero2"))[0]
    for loss, grads in run_distributed(one_step, 2 * dp, parallel):
        for reference_loss, reference in (one, fsdp2):
            assert abs(loss - reference_loss) <= tolerance * reference_loss
            assert max(gradient_errors(grads, reference).values()) <= tolerance


@installed
@pytest.mark.parametrize(("strategy", "dp"), SPREADS, ids=SPREAD_IDS)
def test_loss_curve_is_that_of_fsdp2(run_distributed: Any, strategy: Any, dp: int) -> None:
    parallel = ParallelConfig(strategy=strategy, sp_degree=2, engine="colossalai")
    ours = torch.tensor(run_distributed(curve, 2 * dp, parallel, 20)[0])
    fsdp2 = torch.tensor(run_distributed(curve, 2 * dp, replace(parallel, engine="fsdp2-zero2"), 20)[0])
    assert ours[-1] != ours[0]
    assert float(((ours - fsdp2).abs() / fsdp2).max()) <= 1e-5


@installed
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loss_curve_on_a_gpu_is_that_of_fsdp2() -> None:
    """One NCCL rank, reduction overlapped with backward on a stream of its own."""
    with process_group() as device:
        ours, fsdp2 = (
            torch.tensor(curve(ParallelConfig(engine=engine, attention_provider="torch"), 20, device.type))
            for engine in ("colossalai", "fsdp2-zero2")
        )
    assert float(((ours - fsdp2).abs() / fsdp2).max()) <= 1e-5


def bf16_step(engine: Any) -> tuple[dict[str, Tensor], set[torch.dtype]]:
    """Gradients of a step, and the dtypes that were reduced over ranks."""
    spread = build(ParallelConfig(strategy="ulysses", sp_degree=2, engine=engine, precision="bf16"))
    seen: set[torch.dtype] = set()
    reduce_scatter = dist.reduce_scatter_tensor

    def watch(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.add(input.dtype)
        return reduce_scatter(output, input, *args, **kwargs)

    dist.reduce_scatter_tensor = watch
    try:
        spread.engine.backward(spread.loss(batch(spread, 0)))
    finally:
        dist.reduce_scatter_tensor = reduce_scatter
    return {name: grad.float() for name, grad in spread.engine.full_gradients().items()}, seen


@installed
def test_bf16_gradients_are_reduced_in_fp32_and_as_good_as_those_of_fsdp2(run_distributed: Any) -> None:
    _, exact = run_distributed(one_step, 1, ParallelConfig())[0]
    fsdp2, _ = run_distributed(bf16_step, 2, "fsdp2-zero2")[0]
    allowed = 1.5 * max(gradient_errors(fsdp2, exact).values())
    for grads, reduced_in in run_distributed(bf16_step, 2, "colossalai"):
        assert max(gradient_errors(grads, exact).values()) <= allowed
        assert reduced_in == {torch.float32}


def initial_masters(parallel: ParallelConfig) -> dict[str, Tensor]:
    state = build(parallel).engine.state()["model"]
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


@installed
def test_bf16_masters_are_not_rounded(run_distributed: Any) -> None:
    parallel = ParallelConfig(strategy="ulysses", sp_degree=2, engine="colossalai", precision="bf16")
    masters = run_distributed(initial_masters, 2, parallel)[0]
    expected = run_distributed(initial_masters, 2, replace(parallel, engine="fsdp2-zero2"))[0]
    assert masters.keys() == expected.keys()
    for name, value in masters.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name]), name


def train_and_save(folder: Path, parallel: ParallelConfig, steps: int, more: int) -> list[float]:
    """Losses of the `more` steps after the checkpoint."""
    spread = build(parallel)
    train_steps(spread, 0, steps)
    writer = CheckpointWriter(folder, spread.mesh.flat, keep=1, background=False)
    writer.save(steps, spread.engine.state(), {"name": "test"})
    return train_steps(spread, steps, more)


def load_and_train(folder: Path, parallel: ParallelConfig, steps: int, more: int) -> list[float]:
    # Another learning rate: the checkpoint's is to be taken.
    spread = build(parallel, learning_rate=1.0, seed=1)
    state = spread.engine.state()
    load_checkpoint(candidates(folder)[-1], state)
    spread.engine.load_state(state)
    return train_steps(spread, steps, more)


COLOSSALAI = ParallelConfig(strategy="fastseq", sp_degree=2, engine="colossalai")
RESUMES = {
    "itself-fp32": (COLOSSALAI, 2, COLOSSALAI, 2),
    "itself-bf16": (replace(COLOSSALAI, precision="bf16"), 2, replace(COLOSSALAI, precision="bf16"), 2),
    "itself-on-4-ranks": (COLOSSALAI, 2, COLOSSALAI, 4),
    "fsdp2": (COLOSSALAI, 2, ParallelConfig(strategy="ulysses", sp_degree=2), 4),
    "from-fsdp2": (ParallelConfig(strategy="ulysses", sp_degree=2), 2, COLOSSALAI, 4),
    "from-ddp": (ParallelConfig(engine="ddp"), 1, replace(COLOSSALAI, policy="full"), 2),
}


@installed
@pytest.mark.parametrize("case", RESUMES)
def test_any_engine_goes_on_from_the_checkpoint_of_any_other(tmp_path: Path, run_distributed: Any, case: str) -> None:
    saver, saver_ranks, loader, loader_ranks = RESUMES[case]
    expected = run_distributed(train_and_save, saver_ranks, tmp_path, saver, 3, 3)[0]
    resumed = run_distributed(load_and_train, loader_ranks, tmp_path, loader, 3, 3)[0]
    if saver == loader and saver_ranks == loader_ranks:
        assert resumed == expected
    else:
        for loss, reference in zip(resumed, expected, strict=True):
            assert relative_error(torch.tensor(loss), torch.tensor(reference)) <= 1e-5


def train_demo(config: TrainConfig) -> None:
    if config.parallel.engine == "colossalai":
        use_cpu_accelerator()
    Trainer(config, torch.device("cpu")).train()


@installed
def test_trainer_trains_and_resumes_under_it(tmp_path: Path, run_distributed: Any) -> None:
    model = ModelChoice(depth=1, hidden_size=32, num_heads=4)
    sizes = {"num_frames": 2, "height": 16, "width": 16, "batch_size": 3}
    make_demo_folder(tmp_path / "videos", num_frames=4, size=16)
    config = TrainConfig(videos=tmp_path / "videos", out=tmp_path / "out", model=model, steps=4, **sizes)
    losses = []
    for engine in ("fsdp2-zero2", "colossalai"):
        parallel = ParallelConfig(strategy="ulysses", sp_degree=2, engine=engine)
        whole = replace(config, out=tmp_path / engine, parallel=parallel)
        run_distributed(train_demo, 4, replace(whole, steps=2))
        run_distributed(train_demo, 4, replace(whole, resume=True))
        lines = (whole.out / "metrics.jsonl").read_text().splitlines()
        losses.append(torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64))
    assert len(losses[0]) == 4
    assert float(((losses[1] - losses[0]).abs() / losses[0]).max()) <= 1e-5


def measure(point: Point, oracle_path: str) -> RankResult:
    use_cpu_accelerator()
    return measure_points([point], oracle_path)[0]


@installed
def test_benchmark_gates_and_times_it(tmp_path: Path, run_distributed: Any) -> None:
    model = small_dit(depth=1, hidden_size=32, num_heads=4)
    gate.write_oracle(model, 90, 2, 0, str(tmp_path / "oracle.pt"))
    grid = MeasuredGrid(seq_lens=(90,), ranks=(4,), sp_degrees=(2,), model=model, strategies=("fastseq",))
    (point,) = (p for p in measured_points(grid, device="CPU") if p.parallel.strategy == "fastseq")
    point = replace(
        point,
        timing=Timing(min_samples=2, max_samples=2, budget_s=0.0),
        parallel=replace(point.parallel, engine="colossalai"),
    )
    for result in run_distributed(measure, 4, point, str(tmp_path / "oracle.pt")):
        assert result.reason is None
        assert len(result.samples_s) == 2
        assert result.traffic["sharding.reduce_scatter"] > 0


@installed
def test_cpu_is_refused() -> None:
    with process_group(), pytest.raises(ValueError, match=r"needs a CUDA device, got 'cpu'.*fsdp2-zero2"):
        ParallelDiT(DiT(CONFIG), build_mesh(sp_degree=1), ParallelConfig(engine="colossalai"))


def test_missing_library_is_an_error_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("colossalai", "colossalai.accelerator"):
        monkeypatch.setitem(sys.modules, name, None)
    with process_group(), pytest.raises(ValueError, match="install it with: make setup-colossalai"):
        ParallelDiT(DiT(CONFIG), build_mesh(sp_degree=1), ParallelConfig(engine="colossalai"))


@installed
def test_backward_without_an_optimizer_is_an_error(run_distributed: Any) -> None:
    with pytest.raises(RuntimeError, match=r"ValueError: engine 'colossalai' reduces gradients .*attach\(optimizer\)"):
        run_distributed(backward_unattached, 1)


def backward_unattached() -> None:
    use_cpu_accelerator()
    spread = ParallelDiT(DiT(CONFIG), build_mesh(sp_degree=1), ParallelConfig(engine="colossalai"))
    spread.engine.backward(spread.loss(batch(spread, 0)))


def test_requirements_change_nothing_that_is_pinned() -> None:
    def names(file: str) -> set[str]:
        lines = (Path(__file__).parents[2] / file).read_text(encoding="utf-8").splitlines()
        return {line.split("==")[0].lower().replace("_", "-") for line in lines if line and not line.startswith("#")}

    assert "torch" in names("requirements.txt")
    assert not names("requirements-colossalai.txt") & names("requirements.txt")
