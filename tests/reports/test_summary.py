from __future__ import annotations

from longreel.reports.summary import summary_lines


def test_summary_says_label_baseline_best_ratio_and_counts(sweep):
    lines = summary_lines(sweep)
    assert lines[0] == "MEASURED  2 × CPU process, dit_tiny, full self-attention  (15 ok, 1 wrong, 1 error)"
    assert lines[1] == "  baseline: local, SP 1, DP 2, ZeRO-2, policy full"
    (row,) = (line for line in lines if line.lstrip().startswith("2,048"))
    assert " ".join(row.split()) == "2,048 1,024 1,280 1.25× no verdict ulysses, SP 2, DP 1, ZeRO-2, policy none"
    assert any(line.startswith("PREDICTED  8 × H800 SXM 80GB") for line in lines)
    (longest,) = (line for line in lines if line.lstrip().startswith("819,200"))
    assert longest.split()[1:4:2] == ["oom", "–"]


def test_summary_says_that_ranks_share_cores(make_record):
    lines = summary_lines([make_record(provenance={"sharing": "2 ranks share 1 core"})])
    assert lines[1] == "  2 ranks share 1 core: a check, not a race"


def test_summary_fits_one_screen(make_record):
    records = [make_record(seq_len=1024 * n, is_baseline=True) for n in range(1, 30)]
    records.append(make_record(seq_len=10**6, status="error", reason="first line\n" + "long " * 100))
    lines = summary_lines(records)
    assert len(lines) <= 9
    assert all(len(line) <= 110 and "\n" not in line for line in lines)
    assert any(line.lstrip().startswith("1,000,000") for line in lines)
