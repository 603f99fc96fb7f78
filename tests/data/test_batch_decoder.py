"""Batched decoding against the model asked one row at a time, and the law of its samples."""

import random

import pytest
import torch
from tiny import tiny_model
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fledge.data.sampling import ExtraSampling
from fledge.regeneration.batch_decoder import (
    BatchDecoder,
    DecodingJob,
    nucleus,
    prefill_groups,
    repetition_penalised,
    sample,
)

EOS = 3


def greedy_alone(model, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    """The slow truth: a whole forward per token, no cache, no batch."""
    ids = list(prompt_ids)
    while len(ids) < len(prompt_ids) + max_new_tokens:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt_ids) :]


def decode(model, jobs: list[DecodingJob], batch_size: int) -> None:
    decoder = BatchDecoder(model, eos_token_ids=[EOS], batch_size=batch_size)
    waiting = list(jobs)
    while waiting or decoder.num_live:
        if waiting and decoder.wants_more():
            free = decoder.num_free
            decoder.admit(waiting[:free])
            del waiting[:free]
        decoder.step()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "deepseek_v3"])
def test_rows_that_join_and_leave_get_the_answers_they_get_alone(name):
    model, draw = tiny_model(name), random.Random(0)
    jobs = [
        DecodingJob([draw.randrange(4, 100) for _ in range(draw.randint(2, 30))], draw.randint(1, 25), 0.0, 1.0, 0)
        for _ in range(12)
    ]
    decode(model, jobs, batch_size=6)
    assert [job.output_ids for job in jobs] == [greedy_alone(model, j.prompt_ids, j.max_new_tokens) for j in jobs]
    assert all((job.finish_reason == "stop") == (job.output_ids[-1] == EOS) for job in jobs)
    assert len({tuple(job.output_ids) for job in jobs}) > 8  # the check could fail


def test_a_row_samples_the_same_in_any_company():
    model = tiny_model("llama")
    jobs = [DecodingJob([5, 6, 7 + i % 3], 12, 1.0, 0.9, seed=i) for i in range(9)]
    again = [DecodingJob(job.prompt_ids, 12, 1.0, 0.9, job.seed) for job in jobs]
    decode(model, jobs, batch_size=9)
    decode(model, again[::-1], batch_size=2)
    assert [job.output_ids for job in jobs] == [job.output_ids for job in again]
    other = DecodingJob(jobs[0].prompt_ids, 12, 1.0, 0.9, seed=99)
    decode(model, [other], batch_size=1)
    assert other.output_ids != jobs[0].output_ids


def test_samples_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    draws = [(i + 0.5) / 4000 for i in range(4000)]
    counts = torch.bincount(
        torch.tensor(sample(logits.expand(4000, -1), [0.5] * 4000, [1.0] * 4000, draws)), minlength=4
    )
    assert torch.allclose(counts / 4000, torch.softmax(logits[0] / 0.5, -1), atol=1e-3)
    cut = torch.bincount(torch.tensor(sample(logits.expand(4000, -1), [1.0] * 4000, [0.8] * 4000, draws)), minlength=4)
    assert cut[0] == cut[3] == 0 and abs(cut[2] / cut[1] - torch.e) < 0.02
    assert sample(logits, [0.0], [0.1], [0.999]) == [2]


def test_nucleus_falls_back_to_all_tokens_when_the_candidates_are_too_few():
    flat = torch.full((4096,), 1 / 4096)
    assert int((nucleus(flat, 0.5) > 0).sum()) == 2048
    assert int((nucleus(flat, 0.01) > 0).sum()) == 41


def test_prefill_groups_hold_every_job_and_waste_little():
    jobs = [DecodingJob([1] * length, 1, 0.0, 1.0, 0) for length in (3000, 10, 900, 12, 1000, 11)]
    groups = prefill_groups(jobs)
    assert [[len(job.prompt_ids) for job in group] for group in groups] == [[10, 11, 12], [900, 1000], [3000]] or [
        [len(job.prompt_ids) for job in group] for group in groups
    ] == [[10, 11, 12], [900], [1000], [3000]]


EXTRAS = {
    "repetition_penalty": ExtraSampling(repetition_penalty=1.4),
    "top_k": ExtraSampling(top_k=5),
    "min_p": ExtraSampling(min_p=0.2),
    "all": ExtraSampling(repetition_penalty=1.2, top_k=8, min_p=0.05),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_extra_sampling_keeps_the_tokens_that_transformers_keeps(name):
    """The engine in this process passed over what generation_config asks for, and trained on another distribution."""
    extra, draw = EXTRAS[name], torch.Generator().manual_seed(0)
    logits = torch.randn(3, 20, generator=draw)
    jobs = [DecodingJob([1, 2, 3 + row], 9, 0.8, 0.9, row, extra=extra, output_ids=[7, row]) for row in range(3)]
    expected = transformers_probabilities(logits, jobs)
    penalised = repetition_penalised(logits, jobs)
    draws = [(i + 0.5) / 300 for i in range(300)]
    for row in range(3):
        chosen = sample(penalised[row].expand(300, -1), [0.8] * 300, [0.9] * 300, draws, [extra] * 300)
        shares = torch.bincount(torch.tensor(chosen), minlength=20) / 300
        assert torch.allclose(shares, expected[row], atol=0.005)
        assert chosen != sample(logits[row].expand(300, -1), [0.8] * 300, [0.9] * 300, draws)  # the check could fail


def transformers_probabilities(logits: torch.Tensor, jobs: list[DecodingJob]) -> torch.Tensor:
    """What transformers' generate() would sample from: its own processors, in its order."""
    extra, filled = jobs[0].extra, torch.tensor([[*job.prompt_ids, *job.output_ids] for job in jobs])
    steps = [RepetitionPenaltyLogitsProcessor(extra.repetition_penalty or 1.0)]
    steps += [TemperatureLogitsWarper(jobs[0].temperature)]
    steps += [TopKLogitsWarper(extra.top_k)] if extra.top_k else []
    steps += [TopPLogitsWarper(jobs[0].top_p)]
    steps += [MinPLogitsWarper(extra.min_p)] if extra.min_p else []
    for step in steps:
        logits = step(filled, logits)
    return torch.softmax(logits, dim=-1)


def test_a_repetition_penalty_counts_every_token_of_its_own_row():
    """Against one forward per token: rows that join and leave keep their own tokens apart."""
    model, extra = tiny_model("llama"), ExtraSampling(repetition_penalty=1.5)
    jobs = [DecodingJob([5, 6 + i], 8, 0.0, 1.0, 0, extra=extra if i % 2 else ExtraSampling()) for i in range(4)]
    decode(model, jobs, batch_size=3)
    for job in jobs:
        ids = list(job.prompt_ids)
        penalty = RepetitionPenaltyLogitsProcessor(job.extra.repetition_penalty or 1.0)
        for token in job.output_ids:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1].float()
            assert int(penalty(torch.tensor([ids]), logits).argmax()) == token
            ids.append(token)
    assert jobs[1].output_ids != greedy_alone(model, jobs[1].prompt_ids, 8)  # the penalty matters here
