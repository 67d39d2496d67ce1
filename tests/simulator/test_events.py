from disaggd.simulator.events import EventLoop


def test_what_is_due_earliest_happens_first_and_of_equals_what_was_asked_for_first() -> None:
    loop, seen = EventLoop(), list[tuple[float, str]]()
    for at, name in ((2.0, "late"), (1.0, "one"), (1.0, "other")):
        loop.at(at, lambda name=name: seen.append((loop.now, name)))  # type: ignore[misc]
    loop.run()
    assert seen == [(1.0, "one"), (1.0, "other"), (2.0, "late")]


def test_what_an_action_asks_for_happens_too() -> None:
    loop, seen = EventLoop(), list[float]()
    loop.at(1.0, lambda: loop.after(0.5, lambda: seen.append(loop.now)))
    loop.run()
    assert seen == [1.5]
