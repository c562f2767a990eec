from sparsedm.timing import interleaved_seconds


def test_times_are_medians_without_the_warm_up():
    now = [0.0]

    def taking(*seconds):
        left = iter(seconds)
        return lambda: now.append(now.pop() + next(left))

    calls = taking(9, 1, 2, 6), taking(50, 30, 10, 20)
    assert interleaved_seconds(calls, "cpu", 3, clock=lambda: now[0]) == [2, 20]
