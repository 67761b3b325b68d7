"""The runtime on a tiny random model: what the calls promise, without the weight of a real model."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Iterator

import pytest
import torch

from agentckpt.engine import Engine
from agentckpt.engine.runner import Runner
from agentckpt.engine.sequence import Sequence
from agentckpt.errors import CapacityError, ConflictError, IncompatibleError
from tests.kv.support import DictStore, tiny_model

MODEL = tiny_model()
STOP = 257


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(MODEL, num_blocks=64, max_batch_tokens=64, kv_dtype="f32") as made:
        yield made
        made.check()


def opened(engine: Engine, text: str = "The quick brown fox jumps over the lazy dog") -> Sequence:
    sequence = engine.open_sequence(nonce=bytes(16))
    sequence.append(text)
    return sequence


def kv_bytes(engine: Engine, sequence: Sequence) -> list[bytes]:
    context = sequence.context
    assert context.valid == context.computed
    return [bytes(view) for view in engine.kv.gather(context.runs(0, context.computed))] if context.computed else []


def dense_logprobs(ids: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Log-softmax at every position by dense attention over K and V rounded to ``dtype``: no blocks, no cache."""

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.to(dtype).float().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        scores += torch.full(scores.shape[1:], float("-inf")).triu(1)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)

    hidden = MODEL.model.forward(torch.tensor(ids), torch.arange(len(ids)), attend)
    return MODEL.model.logits(hidden).log_softmax(-1)


# Generation


def test_greedy_generation_is_the_argmax_of_a_dense_forward(engine: Engine) -> None:
    sequence = opened(engine, "x" * 150)
    made = sequence.generate(max_tokens=30).result(30)
    ids = list(sequence.tokens)
    assert ids[150:] == list(made.ids)
    logprobs = dense_logprobs(ids)
    assert [int(logprobs[at - 1].argmax()) for at in range(150, len(ids))] == ids[150:]
    for at, value in enumerate(made.logprobs, start=150):
        assert value == pytest.approx(float(logprobs[at - 1, ids[at]]), abs=1e-4)
    assert sequence.num_computed == len(ids) - 1


@pytest.mark.parametrize("block_size", [1, 8, 16, 64, 128])
@pytest.mark.parametrize("order", ["block", "layer"])
def test_block_size_and_order_change_no_bit(block_size: int, order: str) -> None:
    def run(size: int, physical: str) -> tuple[object, list[bytes]]:
        with Engine(MODEL, block_size=size, kv_order=physical, num_blocks=1024 // size, max_batch_tokens=32) as made:  # type: ignore[arg-type]
            sequence = opened(made, "y" * 100)
            result = sequence.generate(max_tokens=20, temperature=1.0, seed=5).result(30)
            return result, kv_bytes(made, sequence)

    assert run(block_size, order) == run(16, "block")


def test_everything_attends_to_rounded_values() -> None:
    """Prefill, decode and branches alike: with few bits the difference is plain."""
    with Engine(MODEL, num_blocks=64, max_batch_tokens=64, kv_dtype="bf16") as engine:
        sequence = opened(engine, "r" * 100)
        score = sequence.score([[1, 2, 3]]).result(30)[0]
        made = sequence.generate(forced=[1, 2, 3]).result(30)
        rounded, exact = dense_logprobs([*sequence.tokens], torch.bfloat16), dense_logprobs([*sequence.tokens])
        for at, id in enumerate(made.ids):
            assert made.logprobs[at] == pytest.approx(float(rounded[99 + at, id]), abs=1e-4)
            assert score.logprobs[at] == pytest.approx(float(rounded[99 + at, id]), abs=1e-4)
        assert max(abs(made.logprobs[at] - float(exact[99 + at, id])) for at, id in enumerate(made.ids)) > 1e-3


def test_sampling_depends_on_seed_and_nonce_alone(engine: Engine) -> None:
    def run(nonce: bytes, seed: int) -> tuple[int, ...]:
        sequence = engine.open_sequence(nonce=nonce)
        sequence.append("hello")
        ids = sequence.generate(max_tokens=24, temperature=1.5, seed=seed).result(30).ids
        sequence.close()
        return ids

    assert run(bytes(16), 1) == run(bytes(16), 1)
    assert len({run(bytes(16), 1), run(bytes(16), 2), run(b"n" * 16, 1)}) == 3


def test_forced_ids_give_the_same_result_and_the_same_bytes(engine: Engine) -> None:
    one, two = opened(engine), opened(engine)
    made = one.generate(max_tokens=25, temperature=1.2, seed=9, stop="qq").result(30)
    again = two.generate(max_tokens=25, temperature=1.2, seed=9, stop="qq", forced=made.ids).result(30)
    assert again == made
    assert kv_bytes(engine, one) == kv_bytes(engine, two)
    assert one.spans == two.spans


def test_a_stop_ends_the_text_before_it_and_keeps_its_tokens(engine: Engine) -> None:
    ids = engine.tokenizer.encode("say </tool_call> now")
    sequence = opened(engine)
    made = sequence.generate(stop=["</tool_call>", "never"], forced=ids).result(30)
    assert made.text == "say "
    assert made.stop_reason == "stop"
    ended = opened(engine).generate(forced=[*engine.tokenizer.encode("bye"), STOP]).result(30)
    assert (ended.text, ended.stop_reason) == ("bye", "eos")
    cut = opened(engine).generate(forced=engine.tokenizer.encode("né")[:2]).result(30)
    assert (cut.text, cut.stop_reason) == ("n\ufffd", "length")


def test_generation_stops_by_itself_at_a_stop(engine: Engine) -> None:
    free = opened(engine).generate(max_tokens=40, temperature=1.0, seed=3).result(30)
    assert len(free.ids) == 40
    mark = bytes(free.ids[10:12]) if all(id < 128 for id in free.ids[10:12]) else None
    stop = engine.tokenizer.decode(free.ids[20:21]) if mark is None else mark.decode()
    sequence = opened(engine)
    made = sequence.generate(max_tokens=40, temperature=1.0, seed=3, stop=stop).result(30)
    assert made.ids == free.ids[: len(made.ids)]
    assert made.stop_reason == "stop"
    assert engine.tokenizer.decode(made.ids).endswith(stop)
    assert made.text == engine.tokenizer.decode(made.ids)[: -len(stop)]
    assert len(sequence.tokens) == 43 + len(made.ids)


def test_a_generation_in_two_parts_is_one(engine: Engine) -> None:
    whole = opened(engine).generate(max_tokens=20, temperature=1.0, seed=2).result(30)
    sequence = opened(engine)
    first = sequence.generate(max_tokens=8, temperature=1.0, seed=2).result(30)
    second = sequence.generate(max_tokens=12, temperature=1.0, seed=2).result(30)
    assert first.ids + second.ids == whole.ids
    assert first.logprobs + second.logprobs == whole.logprobs


def test_the_request_digest_covers_what_decides_a_generation(engine: Engine) -> None:
    sequence = opened(engine)
    base = sequence.request_digest(max_tokens=5, stop="a")
    assert base == sequence.request_digest(max_tokens=5, stop=["a"], temperature=0, forced=[1])
    others = [{"max_tokens": 6, "stop": "a"}, {"max_tokens": 5}, {"max_tokens": 5, "stop": "a", "seed": 1}]
    others += [{"max_tokens": 5, "stop": "a", "temperature": 0.5}, {"max_tokens": 5, "stop": "a", "top_k": 3}]
    assert len({base, *(sequence.request_digest(**options) for options in others)}) == 6
    sequence.append("b")
    assert sequence.request_digest(max_tokens=5, stop="a") != base
    with pytest.raises(TypeError):
        sequence.request_digest(unknown=1)


# Appending


def test_append_takes_ids_text_and_nothing_else(engine: Engine) -> None:
    sequence = engine.open_sequence()
    assert sequence.append("abc").result() == (97, 98, 99)
    assert sequence.append([1, 2]).result() == (1, 2)
    assert sequence.append([]).result() == ()
    assert sequence.tokens == [97, 98, 99, 1, 2]
    for bad in ([258], [-1], [True], ["x"], [{"content": "no role"}]):
        with pytest.raises(IncompatibleError):
            sequence.append(bad)  # type: ignore[arg-type]
    assert len(sequence.tokens) == 5
    with pytest.raises(IncompatibleError, match="behind nothing"):
        engine.open_sequence().generate()


def test_messages_are_rendered_as_a_suffix(engine: Engine) -> None:
    sequence = engine.open_sequence()
    sequence.append([{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}])
    assert engine.tokenizer.decode(sequence.tokens) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    reply = [*engine.tokenizer.encode("yes"), STOP]
    sequence.generate(forced=reply).result(30)
    before = list(sequence.tokens)
    expected = sequence.encode({"role": "user", "content": "more"})
    assert sequence.append({"role": "user", "content": "more"}).result() == tuple(expected)
    assert sequence.tokens == before + expected
    assert engine.tokenizer.decode(expected) == "\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    assert [(role, content) for role, _, content in sequence.messages] == [
        ("system", "s"), ("user", "hi"), ("assistant", "yes"), ("user", "more"),
    ]  # fmt: skip
    for role, position, content in sequence.messages:
        text = engine.tokenizer.decode(sequence.tokens[position:])
        assert text.lstrip("\n").startswith(content if role == "assistant" else f"<|im_start|>{role}\n{content}")


def test_a_reply_without_its_end_token_is_closed_by_the_template(engine: Engine) -> None:
    sequence = engine.open_sequence()
    sequence.append({"role": "user", "content": "hi"})
    sequence.generate(forced=engine.tokenizer.encode("cut o")).result(30)
    added = sequence.append({"role": "user", "content": "go on", "name": "tester"}).result()
    assert engine.tokenizer.decode(added).startswith("<|im_end|>\n<|im_start|>user\ngo on")
    assert sequence.messages[-1][2] == {"content": "go on", "name": "tester"}
    with pytest.raises(IncompatibleError, match="does not begin") as caught:
        sequence.append({"role": "user", "content": "and again, with no reply between"})
    assert "one list" in str(caught.value.hint)


def test_messages_after_a_truncation(engine: Engine) -> None:
    sequence = engine.open_sequence()
    sequence.append({"role": "user", "content": "one"})
    sequence.generate(forced=[*engine.tokenizer.encode("1"), STOP]).result(30)
    length = len(sequence.tokens)
    sequence.append({"role": "user", "content": "two"})
    sequence.truncate(length)
    added = sequence.append({"role": "user", "content": "three"}).result()
    assert engine.tokenizer.decode(added) == "\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    assert [content for _, _, content in sequence.messages] == ["one", "1", "three"]
    sequence.truncate(5)  # in the middle of the first message
    with pytest.raises(IncompatibleError, match="does not begin"):
        sequence.append({"role": "user", "content": "x"})


def test_truncation_keeps_the_kv_of_the_rest(engine: Engine) -> None:
    sequence = opened(engine, "z" * 200)
    sequence.generate(max_tokens=5).result(30)
    whole = engine.kv.gather(sequence.context.runs(0, 99))
    steps = engine.num_steps
    sequence.truncate(100)
    assert sequence.num_computed == 99
    sequence.generate(max_tokens=1).result(30)
    assert engine.num_steps == steps + 1
    assert [bytes(v) for v in engine.kv.gather(sequence.context.runs(0, 99))] == [bytes(v) for v in whole]
    for length in (-1, 102):
        with pytest.raises(IncompatibleError):
            sequence.truncate(length)


# Forks and scores


def test_forks_share_blocks_and_do_not_meet(engine: Engine) -> None:
    sequence = opened(engine, "w" * 100)
    sequence.generate(max_tokens=5).result(30)
    before = kv_bytes(engine, sequence)
    used = engine.pool.num_blocks - engine.pool.num_free
    forks = sequence.fork(6, nonces=[bytes([i]) * 16 for i in range(6)])
    assert engine.pool.num_blocks - engine.pool.num_free == used
    handles = [fork.generate(max_tokens=10, temperature=1.0, seed=1) for fork in forks]
    made = [handle.result(30).ids for handle in handles]
    assert len(set(made)) == 6
    assert kv_bytes(engine, sequence) == before
    assert engine.pool.num_blocks - engine.pool.num_free == used + 6 * 2 - (105 % 16 == 0)
    engine.check()
    for fork in forks:
        fork.close()
    assert engine.pool.num_blocks - engine.pool.num_free == used
    alone = sequence.generate(max_tokens=3).result(30)
    assert list(alone.ids) == sequence.tokens[-3:]


@pytest.mark.parametrize("length", [1, 40, 130])
def test_scores_equal_independent_forwards(engine: Engine, length: int) -> None:
    sequence = opened(engine, "s" * length)
    texts = ["return a + b", "return a - b", "return", "", "re", "x" * 70, "return a + b"]
    before, spans = list(sequence.tokens), sequence.spans
    scores = sequence.score(texts).result(30)
    assert sequence.tokens == before
    for text, score in zip(texts, scores, strict=True):
        ids = engine.tokenizer.encode(text)
        logprobs = dense_logprobs(before + ids)
        expected = [float(logprobs[length - 1 + i, id]) for i, id in enumerate(ids)]
        assert list(score.logprobs) == pytest.approx(expected, abs=1e-4)
        assert score.total == pytest.approx(sum(expected), abs=1e-4)
    assert sequence.num_computed == length - 1
    assert spans == [] or sequence.spans[: len(spans)] == spans


def test_scoring_in_small_trees_and_packs_changes_nothing(engine: Engine) -> None:
    sequence = opened(engine)
    candidates = [[i % 7, (i * i) % 11, i % 3, i % 5] for i in range(60)]
    whole = sequence.score(candidates).result(30)
    engine.max_scored, engine.pack_rows = 9, 4
    parts = sequence.score(candidates).result(30)
    for a, b in zip(whole, parts, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


# Together


def test_sequences_decode_together_and_finish(engine: Engine) -> None:
    sequences = [opened(engine, chr(97 + i) * (5 + 9 * i)) for i in range(12)]
    alone = []
    for index in range(12):
        one = opened(engine, chr(97 + index) * (5 + 9 * index))
        alone.append(one.generate(max_tokens=8).result(30).ids)
        one.close()
    steps = engine.num_steps
    handles = [sequence.generate(max_tokens=8) for sequence in sequences]
    assert [handle.result(30).ids for handle in handles] == alone
    assert engine.num_steps - steps < 12 * 8


def test_awaiting_many_sequences(engine: Engine) -> None:
    async def run() -> list[int]:
        sequences = [opened(engine, "q" * (3 + i)) for i in range(20)]
        made = await asyncio.gather(*(sequence.generate(max_tokens=4) for sequence in sequences))
        return [len(one.ids) for one in made]

    assert asyncio.run(run()) == [4] * 20


def test_too_small_a_pool_preempts_and_everybody_finishes() -> None:
    with Engine(MODEL, num_blocks=20, max_batch_tokens=32, prefix_reuse="off") as engine:
        sequences = [opened(engine, chr(97 + i) * 60) for i in range(6)]
        handles = [sequence.generate(max_tokens=60, temperature=1.0, seed=1) for sequence in sequences]
        texts = [handle.result(60).ids for handle in handles]
        assert engine.stats()["num_preempted"] > 0
        engine.check()
    for index, ids in enumerate(texts):
        with Engine(MODEL, num_blocks=64, max_batch_tokens=32) as roomy:
            assert opened(roomy, chr(97 + index) * 60).generate(max_tokens=60, temperature=1.0, seed=1).result(30).ids == ids


def test_a_preempted_sequence_is_recomputed_bit_for_bit(engine: Engine) -> None:
    sequence = opened(engine, "p" * 150)
    sequence.generate(max_tokens=20).result(30)
    sequence.append("r" * 30)
    sequence.generate(max_tokens=3).result(30)
    before = kv_bytes(engine, sequence)
    with engine.lock:
        sequence.context.drop()
        for _ in range(engine.pool.num_free):  # nothing is left to revive
            block = engine.pool.allocate()
            engine.pool.release(block)
    assert sequence.context.valid == 0
    sequence.generate(max_tokens=1, forced=[1]).result(30)
    assert [bytes(v) for v in engine.kv.gather(sequence.context.runs(0, 202))] == before


def test_capacity_errors_reach_the_handle_and_leave_the_engine_usable() -> None:
    with Engine(MODEL, num_blocks=4) as engine:
        large = opened(engine, "l" * 100)
        with pytest.raises(CapacityError):
            large.generate().result(30)
        small = opened(engine, "m" * 20)
        assert len(small.generate(max_tokens=3).result(30).ids) == 3
        engine.check()
    short = tiny_model(max_positions=64)
    with Engine(short) as engine:
        sequence = opened(engine, "a" * 60)
        assert len(sequence.generate(max_tokens=50).result(30).ids) == 4
        with pytest.raises(CapacityError):
            sequence.append("b")
        with pytest.raises(CapacityError):
            sequence.generate()


def test_an_error_in_a_step_reaches_its_handle_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence, other = opened(engine), opened(engine, "other")
    real = Runner.piece

    def failing(self: Runner, context: object, *args: int, logits: bool) -> torch.Tensor | None:
        if context is sequence.context:
            raise RuntimeError("device fault")
        return real(self, context, *args, logits=logits)  # type: ignore[arg-type]

    monkeypatch.setattr(Runner, "piece", failing)
    handle, fine = sequence.generate(max_tokens=2), other.generate(max_tokens=2)
    with pytest.raises(RuntimeError, match="device fault"):
        handle.result(30)
    assert len(fine.result(30).ids) == 2
    monkeypatch.undo()
    engine.check()
    assert len(sequence.generate(max_tokens=2).result(30).ids) == 2


def test_one_operation_at_a_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = opened(engine)
    entered, gate = threading.Event(), threading.Event()
    real = Runner.piece

    def slow(self: Runner, *args: object, logits: bool) -> torch.Tensor | None:
        entered.set()
        assert gate.wait(30)
        return real(self, *args, logits=logits)  # type: ignore[arg-type]

    monkeypatch.setattr(Runner, "piece", slow)
    handle = sequence.generate(max_tokens=3)
    assert entered.wait(30)
    for call in (lambda: sequence.append("x"), lambda: sequence.generate(), lambda: sequence.truncate(1), lambda: sequence.score(["a"])):
        with pytest.raises(ConflictError, match="another operation"):
            call()
    done: list[object] = []
    waiting = [threading.Thread(target=lambda: done.append(sequence.fork(1))), threading.Thread(target=sequence.pause)]
    for thread in waiting:
        thread.start()
    assert not done
    gate.set()
    for thread in waiting:
        thread.join(30)
    assert len(done) == 1
    assert not handle.done() or len(handle.result().ids) == 3
    sequence.resume()
    assert len(handle.result(30).ids) == 3


def test_a_paused_sequence_does_not_run(engine: Engine) -> None:
    sequence, other = opened(engine), opened(engine, "other")
    sequence.pause()
    handle = sequence.generate(max_tokens=2)
    other.generate(max_tokens=5).result(30)
    assert not handle.done()
    assert len(sequence.tokens) == 43
    sequence.resume()
    assert len(handle.result(30).ids) == 2


def test_closing_ends_what_runs() -> None:
    engine = Engine(MODEL, num_blocks=64)
    sequence, paused = opened(engine), opened(engine)
    paused.pause()
    stuck = paused.generate(max_tokens=2)
    paused.close()
    with pytest.raises(ConflictError):
        stuck.result(30)
    with pytest.raises(ConflictError):
        paused.append("x")
    paused.close()
    sequence.pause()
    waiting = sequence.generate(max_tokens=2)
    thread = engine._thread
    engine.close()
    engine.close()
    with pytest.raises(ConflictError):
        waiting.result(30)
    with pytest.raises(ConflictError):
        engine.open_sequence()
    assert thread is not None
    assert not thread.is_alive()


# Prefix reuse


def test_exact_reuse_is_invisible() -> None:
    with Engine(MODEL, num_blocks=128, max_batch_tokens=32) as engine:
        first = opened(engine, "k" * 130)
        made = first.generate(max_tokens=10).result(30)
        steps = engine.num_steps
        second = opened(engine, "k" * 130)
        assert second.generate(max_tokens=10).result(30) == made
        assert engine.num_steps - steps == 10
        assert second.num_reused == 128
        assert kv_bytes(engine, first) == kv_bytes(engine, second)
        assert first.spans == second.spans
        shorter = opened(engine, "k" * 60)
        shorter.generate(max_tokens=1).result(30)
        assert shorter.num_reused == 32
        other = opened(engine, "k" * 31 + "j" * 99)
        other.generate(max_tokens=1).result(30)
        assert other.num_reused == 0


def test_exact_reuse_takes_nothing_that_was_computed_otherwise() -> None:
    with Engine(MODEL, num_blocks=128, max_batch_tokens=32) as engine:
        donor = opened(engine, "k" * 40)
        donor.generate(forced=[107] * 60).result(30)
        same = opened(engine, "k" * 100)
        same.generate(max_tokens=1).result(30)
        assert same.num_reused == 32
        with Engine(MODEL, num_blocks=128, max_batch_tokens=32, prefix_reuse="off") as plain:
            alone = opened(plain, "k" * 100)
            alone.generate(max_tokens=1).result(30)
            assert kv_bytes(engine, same) == kv_bytes(plain, alone)
            assert same.spans == alone.spans


def test_any_reuse_takes_every_known_sixteen_tokens() -> None:
    with Engine(MODEL, num_blocks=128, max_batch_tokens=32, prefix_reuse="any") as engine:
        opened(engine, "k" * 50).generate(max_tokens=1).result(30)
        second = opened(engine, "k" * 50 + "j" * 9)
        second.generate(max_tokens=1).result(30)
        assert second.num_reused == 48
    with Engine(MODEL, num_blocks=128, max_batch_tokens=32, prefix_reuse="off") as engine:
        opened(engine, "k" * 50).generate(max_tokens=1).result(30)
        second = opened(engine, "k" * 50)
        second.generate(max_tokens=1).result(30)
        assert second.num_reused == 0


def test_a_block_that_was_written_over_is_not_reused() -> None:
    with Engine(MODEL, num_blocks=16, max_batch_tokens=16) as engine:
        first = opened(engine, "k" * 40)
        first.generate(max_tokens=1).result(30)
        first.truncate(10)
        first.append("j" * 40)
        first.generate(max_tokens=1).result(30)
        second = opened(engine, "k" * 40)
        second.generate(max_tokens=1).result(30)
        assert second.num_reused == 0
        with Engine(MODEL, num_blocks=16, max_batch_tokens=16) as fresh:
            third = opened(fresh, "k" * 40)
            third.generate(max_tokens=1).result(30)
            assert kv_bytes(engine, second) == kv_bytes(fresh, third)


# States


def test_an_exported_state_is_plain_and_continues_elsewhere(engine: Engine) -> None:
    sequence = engine.open_sequence(nonce=b"n" * 16)
    sequence.append({"role": "user", "content": "hi"})
    sequence.generate(max_tokens=12, temperature=1.0, seed=4).result(30)
    state = sequence.export()
    plain = json.loads(json.dumps(dataclasses.asdict(state)))
    assert plain["tokens"] == list(sequence.tokens)
    with Engine(MODEL, num_blocks=64, max_batch_tokens=64, kv_dtype="f32") as other:
        twin = other.import_(state)
        assert twin.messages == sequence.messages
        made = twin.generate(max_tokens=9, temperature=1.0, seed=4).result(30)
        assert made == sequence.generate(max_tokens=9, temperature=1.0, seed=4).result(30)
        assert kv_bytes(other, twin) == kv_bytes(engine, sequence)
    with Engine(tiny_model(seed=2)) as stranger, pytest.raises(IncompatibleError):
        stranger.import_(state)


def test_stop_state_is_derived_from_the_ids(engine: Engine) -> None:
    """A generation cut in the middle of a stop goes on to the stop when its ids are fed again."""
    ids = engine.tokenizer.encode("out</done>")
    sequence = opened(engine)
    sequence.generate(forced=ids[:6], stop="</done>").result(30)
    twin = engine.import_(sequence.export())
    twin.truncate(43)
    assert twin.generate(forced=ids, stop="</done>").result(30).text == "out"


def test_wrong_options_are_refused() -> None:
    for options in (
        {"kv_dtype": "int4"}, {"block_size": 24}, {"block_size": 256}, {"num_blocks": 0}, {"max_batch_tokens": 8},
        {"kv_order": "head"}, {"pin_share": 0.0}, {"prefix_reuse": "maybe"}, {"recompute": "never"},
    ):  # fmt: skip
        with pytest.raises(IncompatibleError):
            Engine(MODEL, **options)  # type: ignore[arg-type]


def test_describe_names_what_decides_compatibility(engine: Engine) -> None:
    found = engine.describe()
    assert found["model"] == "tiny"
    assert bytes.fromhex(str(found["model_id"])) == MODEL.model_id
    with Engine(MODEL, kv_dtype="bf16", block_size=64, kv_order="layer", max_batch_tokens=64) as other:
        assert other.describe()["kv_id"] != found["kv_id"]
    with Engine(MODEL, kv_dtype="f32", block_size=64, kv_order="layer", num_blocks=9, max_batch_tokens=64) as other:
        assert other.describe()["kv_id"] == found["kv_id"]
        assert other.describe()["numerics_id"] == found["numerics_id"]
    with Engine(MODEL, kv_dtype="f32", max_batch_tokens=32) as other:
        assert other.describe()["numerics_id"] != found["numerics_id"]


def test_a_capture_of_a_running_sequence_falls_between_steps(engine: Engine) -> None:
    store = DictStore()
    sequence = opened(engine, "c" * 200)
    handle = sequence.generate(max_tokens=60)
    refs = []
    while not handle.done():
        refs.append(sequence.capture(store, refs[-1] if refs else None).write().ref)
    made = handle.result(30)
    assert len(refs) > 1
    for ref in refs[:: max(1, len(refs) // 4)]:
        twin = engine.open_sequence(nonce=bytes(16))
        report = twin.prepare(store, ref).commit()
        assert report.recomputed == 0
        rest = 260 - len(twin.tokens)
        if rest:
            twin.generate(max_tokens=rest).result(30)
        assert twin.tokens[200:] == list(made.ids)
        twin.close()
