"""The fidelity suite itself works, and finds nothing on its quickest subject; `make fidelity` runs all of it."""

from benchmarks import fidelity


def test_the_quick_suite_finds_every_mode_exact() -> None:
    rows = list(fidelity.rows(None, quick=True))
    assert len(rows) == 15
    assert [row for row in rows if not row.good] == []


def test_a_wrong_token_is_found() -> None:
    subject = fidelity.tiny_subject("llama", quick=True)
    right = fidelity.generate(subject, subject.prompts[0])
    row = fidelity.compare(subject, "greedy", {"sampling": fidelity.GREEDY}, lambda _prompt: right)
    assert not row.good
    assert row.note.startswith("prompt 1")
