"""Synthetic records: a measured group on a CPU and a predicted one on eight GPUs, with every status."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from longreel.reports.html import render, write_report
from longreel.reports.op_records import OpRecord
from longreel.reports.records import Record

GIB = 2**30
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

MakeRecord = Callable[..., Record]


def build_record(**changes: Any) -> Record:
    """A valid measured record with some fields changed; the configuration follows them, so that keys differ."""
    values: dict[str, Any] = {
        "kind": "measured",
        "regime": "full",
        "status": "ok",
        "model": "dit_tiny",
        "device": "CPU process",
        "strategy": "local",
        "sp_degree": 1,
        "num_devices": 2,
        "engine": "fsdp2-zero2",
        "policy": "full",
        "attention": "sdpa-math",
        "seq_len": 1024,
        "batch_per_group": 1,
        "samples_s": (1.9, 2.0, 2.2),
        "step_s": 2.0,
        "interval_s": (1.9, 2.2),
        "memory": {"process": 713 * 2**20, "process_before": 673 * 2**20},
        "traffic": {"all_to_all": 1000, "reduce_scatter": 500},
        "error": {"loss": 1e-7, "grad": 3e-7, "tolerance": 1e-5},
        "provenance": {
            "commit": "c0ffee",
            "time": "2026-11-22T10:00:00Z",
            "command": "python bench/sweep.py",
            "versions": {"torch": "2.13.0"},
            "environment": {"cpu": "a CPU"},
        },
    } | changes
    values.setdefault("dp_degree", values["num_devices"] // values["sp_degree"])
    if values["status"] not in ("ok", "wrong") and "step_s" not in changes:
        values |= {"step_s": None, "interval_s": None, "samples_s": ()}
    if values["status"] != "ok":
        values.setdefault("reason", f"it was {values['status']}")
    values.setdefault("config", {k: values[k] for k in ("strategy", "sp_degree", "policy", "seq_len", "engine")})
    return Record(**values)


def build_sweep() -> list[Record]:
    records = []
    for i, seq_len in enumerate((1024, 2048, 4096)):
        base = 2.0 * 2**i
        for strategy, sp_degree, policy, step in (
            ("local", 1, "full", base),
            ("local", 1, "none", base * 0.9),
            ("ulysses", 2, "full", base * 0.45),
            ("ulysses", 2, "none", base * 0.4),
            ("fastseq", 2, "full", base * 0.6),
        ):
            records.append(
                build_record(
                    strategy=strategy,
                    sp_degree=sp_degree,
                    policy=policy,
                    seq_len=seq_len,
                    is_baseline=strategy == "local" and policy == "full",
                    step_s=step,
                    interval_s=(step * 0.95, step * 1.1),
                    samples_s=(step * 0.95, step, step * 1.1),
                )
            )
    records.append(build_record(strategy="fastseq", sp_degree=2, policy="none", status="wrong", reason="grad off by 3"))
    records.append(build_record(strategy="ring", sp_degree=2, policy="none", status="error", reason="worker died"))
    for seq_len in (8192, 131072, 614400, 819200):
        for strategy, sp_degree in (("local", 1), ("ulysses", 2), ("ulysses", 8), ("fastseq", 8)):
            used = int((10 + 75 * seq_len / 614400 / sp_degree) * GIB)
            fits = used < 80 * GIB
            step = seq_len / 1e5 / sp_degree**0.9
            outcome: dict[str, Any] = {
                "step_s": step,
                "interval_s": (step * 0.8, step * 1.3),
                "breakdown": {"attention": 0.8 * step, "matmul": 0.14 * step, "sequence": 0.06 * step},
                "hidden": {"sequence": 0.1 * step},
            }
            if not fits:
                outcome = {"status": "oom", "reason": f"needs {used / GIB:.0f} GiB of 80 GiB"}
            records.append(
                build_record(
                    kind="predicted",
                    model="dit_xl_2",
                    device="H800 SXM 80GB",
                    num_devices=8,
                    strategy=strategy,
                    sp_degree=sp_degree,
                    seq_len=seq_len,
                    is_baseline=strategy == "local",
                    memory={"allocated": used},
                    memory_limit=80 * GIB,
                    samples_s=(),
                    error={},
                    **outcome,
                )
            )
    return records


@pytest.fixture
def make_record() -> MakeRecord:
    return build_record


@pytest.fixture(scope="session")
def make_op() -> Callable[..., OpRecord]:
    """A measured record of attention: provider, length and median time in seconds."""

    def make(provider: str, seq_len: int = 4096, median_s: float = 2e-3) -> OpRecord:
        return OpRecord(
            kind="measured",
            status="ok",
            op="attention",
            direction="forward",
            provider=provider,
            is_ours=provider == "triton",
            dtype="bf16",
            device="a GPU",
            shape={"batch": 1, "seq_len": seq_len, "num_heads": 2, "head_dim": 72},
            run="r1",
            median_s=median_s,
            flops=1e12,
        )

    return make


@pytest.fixture(scope="session")
def report(sweep) -> str:
    """The page of the sweep."""
    return render(sweep)


@pytest.fixture(scope="session")
def sweep() -> list[Record]:
    """15 measured `ok` points, a wrong and a failed one on 2 processes; 16 predicted points on 8 GPUs, some oom."""
    return build_sweep()


@dataclass
class Visit:
    """An open page and what it did that a report must not do."""

    page: Any
    console: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, address: str) -> None:
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("html[data-ready]")

    def assert_silent(self, address: str) -> None:
        """No message, no error, and no request but the page itself and what it saved."""
        assert self.console == []
        assert self.errors == []
        assert [url for url in self.requests if not url.startswith("blob:")] == [address]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def address(tmp_path_factory, sweep) -> str:
    """Of the sweep's page."""
    return write_report(tmp_path_factory.mktemp("report"), sweep, page_only=True).as_uri()


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., Visit]]:
    """Opens a page: its address, then options of the browser's page; 1280 pixels wide by default."""
    pages = []

    def open_(address: str, *, width: int = 1280, **options: Any) -> Visit:
        pages.append(browser.new_page(viewport={"width": width, "height": 900}, **options))
        visit = Visit(pages[-1])
        visit.open(address)
        return visit

    yield open_
    for page in pages:
        page.close()


@pytest.fixture
def visit(open_page, address) -> Visit:
    """The sweep's page, open."""
    return open_page(address)
