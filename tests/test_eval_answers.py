"""Greedy answers of `dsv4q eval` against one token after the other, and its counters against a loop that drafts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from artifact_maker import read
from dsv4q.errors import DataError, UsageError
from dsv4q.evaluation import greedy
from dsv4q.evaluation.answers import Answer, AnswersRequest, count_drafts, prompts_of, read_answers
from dsv4q.model.model import DeepseekV4ForCausalLMWithMTP
from eval_toys import changed, noise_like, run_eval, write_counting_toy
from stock import load
from test_end_to_end import command

EOS = 1
ASKED = AnswersRequest(count=3, tokens=12)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy whose draft is right more often than not."""
    return write_counting_toy(tmp_path_factory.mktemp("answers") / "source", draft_gain=0.3)


@pytest.fixture(scope="module")
def whole(source: Path) -> DeepseekV4ForCausalLMWithMTP:
    return load(source)


@pytest.fixture(scope="module")
def answered(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The toy and one with another draft."""
    name = "mtp.0.ffn.shared_experts.w2.weight"
    other = changed(source, tmp_path_factory.mktemp("other") / "out", {name: noise_like(source, name, 0.5)})
    return run_eval(other, source, answers=ASKED)["answers"]


# ------------------------------------------------------------------------------------------------ the text


@torch.no_grad()
def test_an_answer_is_what_one_token_after_the_other_gives(
    answered: Mapping[str, Any], whole: DeepseekV4ForCausalLMWithMTP
) -> None:
    assert len(answered["prompts"]) == 3
    for prompt, answer in zip(answered["prompts"], answered["reference"]["answers"], strict=True):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(whole(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == EOS:
                break
        assert answer == ids[len(prompt) :]
    assert answered["reference"]["own_choice"] == 1.0


def test_two_models_with_one_main_model_give_the_same_answers_at_once(answered: Mapping[str, Any]) -> None:
    assert answered["equal"] == 3 and answered["artifact"]["answers"] == answered["reference"]["answers"]
    assert answered["artifact"]["passes"] == 1 <= answered["reference"]["passes"] <= 12


def test_a_model_that_is_read_again_for_each_pass_gives_the_same(
    source: Path, answered: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greedy, "RESIDENT", 0)
    result = run_eval(source, source, answers=ASKED)
    assert result["answers"]["reference"] == answered["reference"]


@given(st.integers(1, 12), st.integers(0, 2**32), st.integers(2, 5))
def test_guesses_settle_on_what_one_token_after_the_other_gives(tokens: int, seed: int, vocab: int) -> None:
    def next_of(ids: Sequence[int]) -> int:
        return hash((seed, *ids)) % vocab

    expected: list[int] = []
    while len(expected) < tokens and EOS not in expected:
        expected.append(next_of(expected))
    guess = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(seed))
    answer = Answer(torch.tensor([7]), guess)
    passes = 0
    while not answer.is_done:
        ids = answer.tokens.tolist()
        answer.settle(torch.tensor([next_of(ids[:at]) for at in range(len(ids))]), EOS)
        passes += 1
    assert answer.tokens.tolist() == expected and 1 <= passes <= tokens


def test_a_prompt_ends_with_the_beginning_of_the_assistants_first_turn() -> None:
    rows = torch.tensor([[0, 5, 8, 9, 6, 8, 9, 7], [0, 5, 8, 6, 9, 6, 6, 6]])
    with_turn, without = prompts_of([rows], AnswersRequest(count=2, tokens=6), [8, 9])
    assert with_turn.prompt.tolist() == [0, 5, 8, 9] and with_turn.tokens.tolist() == [6, 8, 9, 7, 0, 0]
    assert without.prompt.tolist() == [0, 5, 8, 6] and without.settled == 0


# ------------------------------------------------------------------------------------------------ counters


@torch.no_grad()
def drafted(model: DeepseekV4ForCausalLMWithMTP, ids: list[int], k: int) -> list[int]:
    """What MTP drafts behind the tokens that are known, by itself."""
    known = torch.tensor([ids])
    streams = model.residual_streams(known)[:, :-1]
    tokens, found = known[:, 1:], []
    for _ in range(k):
        found.append(int(model.draft_logits(streams, tokens)[0, -1].argmax()))
        own = model.draft_streams(streams, tokens)[:, -1:]
        streams, tokens = torch.cat([streams, own], dim=1), torch.cat([tokens, torch.tensor([found[-1:]])], dim=1)
    return found


@torch.no_grad()
def serve(model: DeepseekV4ForCausalLMWithMTP, prompt: list[int], limit: int, k: int) -> tuple[list[int], int, int]:
    """Greedy speculative decoding as an engine does it: the answer, drafts, accepted tokens."""

    def choice(ids: list[int]) -> int:
        return int(model(torch.tensor([ids])).logits[0, -1].argmax())

    answer, drafts, accepted = [choice(prompt)], 0, 0
    while len(answer) < limit and EOS not in answer:
        new: list[int] = []
        for proposal in (*drafted(model, prompt + answer, k), None):
            new.append(choice(prompt + answer + new))
            if new[-1] != proposal:
                break
        drafts, accepted, answer = drafts + 1, accepted + len(new) - 1, answer + new
    answer = answer[:limit]
    return answer[: answer.index(EOS) + 1] if EOS in answer else answer, drafts, accepted


@pytest.mark.parametrize("k", [1, 2])
def test_the_counters_are_those_of_a_loop_that_drafts_and_verifies(
    answered: Mapping[str, Any], whole: DeepseekV4ForCausalLMWithMTP, k: int
) -> None:
    served = [serve(whole, prompt, 12, k) for prompt in answered["prompts"]]
    found, counts = answered["reference"], answered["reference"]["counts"]
    assert [one[0] for one in served] == found["answers"]
    drafts, accepted = (sum(one[at] for one in served) for at in (1, 2))
    assert 0 < accepted < drafts * k
    if k == 1:
        assert (counts["drafts_1"], counts["accepted_1"]) == (drafts, accepted)
    else:
        both = counts["accepted_2_position_1"] + counts["accepted_2_position_2"]
        assert (counts["drafts_2"], both) == (drafts, accepted)
    assert found[f"k_{k}"]["acceptance"]["value"] == pytest.approx(accepted / (drafts * k))
    assert found[f"k_{k}"]["mean_accepted_length"]["value"] == pytest.approx(1 + accepted / drafts)


def test_a_second_proposal_counts_only_behind_an_accepted_first_one() -> None:
    answer = Answer(torch.tensor([0, 5]), torch.tensor([6, 7, 8, 9]), 4)
    # With the token at place t + 1 known, first[t] is for t + 2: right for 7, wrong for 8, right for 9.
    first, second = torch.tensor([0, 7, 0, 9, 0]), torch.tensor([0, 8, 9, 4, 0])
    # k = 1: 7 accepted, 8 is the main model's; 9 accepted, the end. k = 2: 7 and 8 accepted, 9 is the main model's.
    assert count_drafts(answer, first, second, 4) == [2, 2, 1, 1, 1, 4]


def test_what_is_drafted_beyond_the_end_is_counted_as_an_engine_does() -> None:
    answer = Answer(torch.tensor([0]), torch.tensor([6, EOS]), 2)
    assert count_drafts(answer, torch.tensor([EOS, 0]), torch.tensor([3, 0]), 3) == [1, 1, 1, 1, 1, 2]
    assert count_drafts(answer, torch.tensor([EOS, 0]), torch.tensor([3, 0]), 4) == [1, 1, 1, 1, 0, 2]


def test_an_answer_of_one_token_drafts_nothing() -> None:
    none = torch.zeros(1, dtype=torch.int64)
    assert count_drafts(Answer(torch.tensor([0]), torch.tensor([EOS]), 1), none, none, 0) == [0, 0, 0, 0, 0, 1]


def test_a_spoiled_draft_is_accepted_less_on_the_same_answers(source: Path, tmp_path: Path) -> None:
    name = "mtp.0.e_proj.weight"
    bad = changed(source, tmp_path / "bad", {name: noise_like(source, name)})
    found = run_eval(bad, source, answers=ASKED)["answers"]
    assert found["equal"] == 3
    assert found["artifact"]["k_1"]["acceptance"]["value"] < 0.2 < found["reference"]["k_1"]["acceptance"]["value"]
    assert found["differences"]["k_1 acceptance"]["high"] < 0


def test_without_a_draft_there_are_answers_and_no_counts(source: Path, tmp_path: Path) -> None:
    bare = changed(source, tmp_path / "bare", dict.fromkeys(n for n in read(source) if n.startswith("mtp.")))
    found = run_eval(bare, source, answers=AnswersRequest(count=1, tokens=4))["answers"]
    assert found["equal"] == 1 and found["differences"] == {}
    assert found["artifact"]["k_1"]["acceptance"]["value"] is None
    assert found["reference"]["counts"]["drafts_1"] > 0


# ------------------------------------------------------------------------------------------------ answers of a server


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_given_answers_are_judged_as_they_are(source: Path, answered: Mapping[str, Any], tmp_path: Path) -> None:
    own = answered["reference"]["answers"]
    text = {"prompts": answered["prompts"], "answers": [own[0], own[1][:5], [3, *own[2][1:]]]}
    found = run_eval(source, source, answers=AnswersRequest(file=write(tmp_path / "served.json", text)))["answers"]
    for side in ("reference", "artifact"):
        assert found[side]["answers"] == text["answers"] and found[side]["passes"] == 0
        assert found[side]["counts"]["tokens"] == len(own[0]) + 5 + len(own[2])
        assert 0 < found[side]["own_choice"] < 1


def test_prompts_alone_are_answered(source: Path, answered: Mapping[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path / "prompts.json", {"prompts": answered["prompts"]})
    found = run_eval(source, source, answers=AnswersRequest(file=file, tokens=12))["answers"]
    assert found["reference"]["answers"] == answered["reference"]["answers"]
    assert found["reference"]["counts"] == answered["reference"]["counts"]


@pytest.mark.parametrize(
    "content",
    [
        [], {}, {"prompts": []}, {"prompts": [[]]}, {"prompts": [[1], [2]], "answers": [[1]]}, {"prompts": [[9]]},
        {"prompts": [[1.0]]}, {"prompts": [[True]]}, {"prompts": [[-1]]}, {"prompts": "12"}, {"answers": [[1]]},
        {"prompts": [[1]], "answers": [[]]}, {"prompts": [[1]], "answers": None}, {"prompts": {"0": [1]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_file_of_another_form_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(DataError, match="another form"):
        read_answers(write(tmp_path / "bad.json", content), 4, 9)


@pytest.mark.parametrize("content", [b"", b"\xff", b"{", b"[" * 100_000])
def test_a_file_that_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        read_answers(tmp_path / "bad.json", 4, 9)


@pytest.mark.parametrize(
    ("request_", "where"),
    [({"count": -1}, "--answers"), ({"count": 1, "tokens": 1}, "--answer-tokens"),
     ({"count": 1, "file": Path("x")}, "--answers-from")],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused_by_the_options_name(request_: dict[str, Any], where: str) -> None:
    with pytest.raises(UsageError, match=where):
        AnswersRequest(**request_)


def test_more_answers_than_samples_are_refused(source: Path) -> None:
    with pytest.raises(UsageError, match="at most 3"):
        run_eval(source, source, answers=AnswersRequest(count=4))


def test_the_command_shows_both_acceptances_side_by_side(source: Path) -> None:
    line = ("eval", str(source), "--reference", str(source), "--device", "cpu", "--samples", "3", "--length", "48")
    shown = command(*line, "--answers", "3", "--answer-tokens", "12").stdout
    assert "MTP draft acceptance" in shown and "on each model's own greedy answers" in shown
    assert "3 of them the same tokens from both" in shown


def test_padding_and_neighbours_in_a_batch_change_no_answer(source: Path, answered: Mapping[str, Any]) -> None:
    found = run_eval(source, source, answers=ASKED, micro_batch=1)["answers"]
    assert found["reference"]["answers"] == answered["reference"]["answers"]
