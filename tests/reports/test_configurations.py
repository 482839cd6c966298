from __future__ import annotations

from longreel.reports.configurations import labels


def test_name_holds_what_differs_and_no_more(make_record):
    assert labels([make_record(), make_record(strategy="ulysses", sp_degree=2)]) == [
        "local, SP 1, full",
        "ulysses, SP 2, full",
    ]
    other = make_record(engine="fsdp2-zero3", attention="triton", batch_per_group=4)
    assert labels([make_record(), other]) == [
        "local, SP 1, ZeRO-2, full, sdpa-math, × 1",
        "local, SP 1, ZeRO-3, full, triton, × 4",
    ]


def test_options_are_named_only_where_names_would_be_shared(make_record):
    def of(**options):
        strategy = options.pop("strategy", "ulysses")
        return make_record(strategy=strategy, sp_degree=2, config={"parallel": {"strategy": strategy} | options})

    records = [of(head_chunks=1, mlp_tile=None), of(head_chunks=4, mlp_tile=None), of(strategy="ring", head_chunks=2)]
    assert labels(records) == [
        "ulysses, SP 2, full, head_chunks 1",
        "ulysses, SP 2, full, head_chunks 4",
        "ring, SP 2, full",
    ]
    assert labels([make_record(config={"parallel": "torn"})]) == ["local, SP 1, full"]
