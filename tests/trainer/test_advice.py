"""One line of advice where the step waits for data: the right number of threads, and not too often."""

import pytest

from trainer.advice import SILENCE, WINDOW, DataAdvisor, data_advice


@pytest.mark.parametrize(
    ("wait", "threads", "cores", "said"),
    [
        (0.25, 9, 16, "data wait 25 %: raise --workers to 12, or"),  # 9 threads do three quarters of the work
        (0.5, 6, 16, "raise --workers to 12, or"),
        (0.9, 4, 16, "raise --workers to 16, or"),  # no more than there are cores
        (0.999, 4, 16, "raise --workers to 16, or"),
        (1.0, 4, 16, "raise --workers to 16, or"),
        (0.3, 8, 8, "all 8 cores of this rank are at work already"),
        (0.3, 9, 8, "all 8 cores of this rank are at work already"),
    ],
)
def test_the_threads_that_would_do(wait, threads, cores, said):
    assert said in data_advice(wait, threads, cores)
    assert "\n" not in data_advice(wait, threads, cores)


def test_a_wait_that_is_not_felt_is_not_spoken_of():
    assert data_advice(0.09, 1, 16) == ""


def test_it_speaks_of_a_lasting_wait_and_not_too_often():
    advisor = DataAdvisor(threads=4, cores=16)
    said = [advisor.hear(waited=3.0, elapsed=10.0) for _ in range(int((WINDOW + SILENCE) / 10) + 6)]
    spoken = [i for i, line in enumerate(said) if line]
    # After the first window, and again when the silence and a window are over.
    assert spoken == [WINDOW / 10 - 1, (WINDOW + SILENCE) / 10 - 1]
    assert all("data wait 30 %" in said[i] for i in spoken)


def test_a_short_stall_is_averaged_away():
    advisor = DataAdvisor(threads=4, cores=16)
    said = [advisor.hear(waited=5.0, elapsed=5.0), *(advisor.hear(waited=0.0, elapsed=11.0) for _ in range(5))]
    assert not any(said)
