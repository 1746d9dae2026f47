"""Every document of a pass is read exactly once, whenever a run is killed and on however many ranks it goes on."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter

import pytest

from momoe_titan.data.order import Order
from momoe_titan.data.packing import PACKERS
from momoe_titan.data.position import unpack_position, why_other_data
from tests.support.text_data import batches, loaders, numbered, states_of, tokens_in


def lengths(documents: int, seed: int) -> list[int]:
    """Numbers of tokens: mostly short, some longer than a sequence of 8, some empty."""
    chosen = random.Random(seed)
    return [chosen.choice([0, 1, 2, 3, 5, 8, 13, 40]) for _ in range(documents)]


def read_so_far(order: Order, states: list[bytes]) -> Counter:
    """How many tokens of each document must have been in batches, by the positions of all ranks."""
    places = [unpack_position(state)[1] for state in states]
    farthest = max(place.next for place in places)
    part = dict.fromkeys(range(farthest), None)  # how many tokens of the document at a position, None for all
    for place in places:
        part.update(dict.fromkeys(range(place.next, farthest, place.step), 0))
        assert not {position for position, _ in place.left} & {p for p, tokens in part.items() if tokens is not None}
        part.update(dict(place.left))
    expected: Counter = Counter()
    for position, (source, document, _) in zip(part, order.find(list(part)), strict=True):
        number, length = map(int, order.sources[source].read([document])[0].split())
        expected[number] += length if part[position] is None else part[position]
    return +expected


ORDERS = {
    "one source": lambda: Order([numbered(1, lengths(37, 1))]),
    "in order": lambda: Order([numbered(1, lengths(37, 1))], shuffle=False),
    "one document": lambda: Order([numbered(1, [11])]),
    "mixed": lambda: Order([numbered(1, lengths(300, 2)), numbered(301, lengths(5, 3))], [0.7, 0.3], seed=4),
}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("data", ORDERS)
def test_killed_at_random_steps_and_resumed_on_other_ranks(data, packing):
    chosen = random.Random(f"{data} {packing}")
    order, states, seen = ORDERS[data](), [], Counter()
    for _ in range(20 if len(order.sources) == 2 else 6):
        ranks = chosen.choice([1, 2, 3, 5])
        built = loaders(order, ranks, states, packing=packing)
        steps = chosen.randrange(12)
        for loader in built:
            seen += tokens_in(batches(loader, steps))
        states = states_of(built)
        assert seen == read_so_far(order, states)


def test_threads_and_batches_read_ahead_change_nothing():
    order, states, seen = ORDERS["mixed"](), [], Counter()
    plain = batches(loaders(order, 1)[0], 12)
    for ranks, threads, ahead in ((1, 1, 1), (2, 3, 4), (1, 2, 9)):
        built = loaders(order, ranks, states, threads=threads, ahead=ahead)
        taken = [batches(loader, 6) for loader in built]
        assert ranks > 1 or states or taken[0] == plain[:6]
        for each in taken:
            seen += tokens_in(each)
        states = states_of(built)
        assert seen == read_so_far(order, states)


def test_a_process_with_threads_is_killed_and_goes_on(tmp_path):
    """kill -9 at any moment of a process that tokenizes ahead; each of its steps is a checkpoint."""
    order, states, seen = ORDERS["mixed"](), [], Counter()
    steps = tmp_path / "steps"
    for ranks in (1, 2, 3):
        steps.write_text("")

        def work(ranks: int = ranks, states: list[bytes] = states) -> None:
            built = loaders(order, ranks, states, threads=2, ahead=3)
            with open(steps, "a") as f:
                for step in zip(*built, strict=True):
                    counted = tokens_in((inputs["input"].tolist(), labels.tolist()) for inputs, labels in step)
                    f.write(json.dumps([counted, [state.decode() for state in states_of(built)]]) + "\n")
                    f.flush()

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        while steps.read_text().count("\n") < 3 and process.is_alive():
            time.sleep(0.001)
        time.sleep(random.random() / 50)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        lines = [json.loads(line) for line in steps.read_text().split("\n")[:-1]]
        for counted, _ in lines:
            seen += Counter({int(token): count for token, count in counted.items()})
        states = [state.encode() for state in lines[-1][1]]
        assert seen == read_so_far(order, states)


@pytest.mark.parametrize("packing", PACKERS)
def test_the_same_ranks_go_on_to_the_bit(packing):
    order = ORDERS["mixed"]()
    for ranks in (1, 3):
        whole = [batches(loader, 20) for loader in loaders(order, ranks, packing=packing)]
        for taken in (0, 1, 11):
            first = loaders(order, ranks, packing=packing)
            for loader in first:
                batches(loader, taken)
            states = states_of(first)
            resumed = loaders(order, ranks, states, packing=packing)
            assert states_of(resumed) == states
            assert [batches(loader, 20 - taken) for loader in resumed] == [each[taken:] for each in whole]


def test_a_pass_has_each_document_once_and_the_next_pass_another_order():
    order = Order([numbered(1, [1] * 1000)])
    passes = [[order.find([p])[0] for p in range(1000 * n, 1000 * (n + 1))] for n in range(3)]
    for number, each in enumerate(passes):
        assert sorted(document for _, document, _ in each) == list(range(1000))
        assert {n for _, _, n in each} == {number}
    first, second = ([document for _, document, _ in each] for each in passes[:2])
    assert first != second and first != sorted(first)
    assert Order(order.sources, seed=1).find(range(9)) != order.find(range(9)) == Order(order.sources).find(range(9))


def test_the_order_stays_the_same_from_version_to_version():
    """Of this package and of numpy. One that changes it raises `order.MIXING`, or reads documents of a pass twice."""
    order = Order([numbered(1, [1] * 50), numbered(51, [1] * 20000)], [1, 1], seed=3)
    assert order.find(range(65534, 65542)) == [
        (0, 14, 823), (0, 35, 823), (0, 3, 823), (1, 11676, 1), (0, 27, 823), (0, 19, 823), (1, 1822, 1), (0, 15, 823)
    ]  # fmt: skip
    now = order.described()
    then = {key: value for key, value in now.items() if key != "mixing"}
    assert "mixed sources in another order" in why_other_data(then, now, "data") and not why_other_data(now, now, "")
    one = Order(order.sources[:1]).described()
    then = {key: value for key, value in one.items() if key != "mixing"}
    assert now["mixing"] == 2 and not why_other_data(then, one, "data")  # of one source nothing was mixed


def test_ranks_of_a_later_pass_share_it(caplog):
    """More ranks than documents is no fault: they are in different passes."""
    order = Order([numbered(1, [8])])
    assert [tokens_in(batches(loader, 2)) for loader in loaders(order, 3)] == [Counter({1: 32})] * 3
    assert "numbered: begins to read it for time 2" in caplog.text


def test_documents_without_a_token_end_in_an_error():
    with pytest.raises(ValueError, match="numbered: no document has a token"):
        batches(loaders(Order([numbered(1, [0, 0, 0])]), 1)[0], 1)
