"""What a trial says of the side that should run a function."""

import pytest

from shardmill.cli.trying import Trial, print_trial
from shardmill.client.shards import StreamedSample
from shardmill.core.api import TransformStatistics


def trial_of(before: dict[str, bytes], after: dict[str, bytes]) -> Trial:
    """One sample: 2 ms of reading, decoding and the function, 3 ms of encoding."""
    costs = TransformStatistics(
        samples=1, seconds_read=0.0002, seconds_decode=0.0008, seconds_user=0.001, seconds_encode=0.003
    )
    samples = [StreamedSample("0", before)], [StreamedSample("0", after)]
    return Trial("t@0123456789ab", *samples, first_byte=0.1, seconds=0.2, costs=costs)


def test_a_trainer_saves_no_more_than_it_would_spend(capsys: pytest.CaptureFixture[str]) -> None:
    trial = trial_of({"jpg": bytes(100_000)}, {"jpg": bytes(1_000)})
    assert trial.trainer_seconds == pytest.approx(0.002)  # it would not encode
    assert trial.saved_seconds == pytest.approx(0.002)
    print_trial(trial)
    assert "of 2.0 ms CPU per sample a trainer would save about 2.0 ms, less what decoding" in capsys.readouterr().out


def test_what_a_sample_became_stands_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    def named(*keys: str) -> list[StreamedSample]:
        return [StreamedSample(key, {"cls": b"1"}) for key in keys]

    def shown(after: list[StreamedSample]) -> list[str]:
        costs = TransformStatistics()
        print_trial(Trial("t@0123456789ab", named("a", "b"), after, first_byte=0.1, seconds=0.2, costs=costs))
        lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()
        return [line.strip() for line in lines if "cls" not in line]

    assert shown(named("a", "b")) == ["a", "b"]
    assert shown(named("a-0", "a-1", "b-0")) == ["a", "-> a-0", "-> a-1", "b", "-> b-0"]
    assert shown(named("b")) == ["a", "-> nothing", "b"]
    assert shown(named("a", "mine")) == ["a", "b", "-> nothing under this key", "-> mine"]


def test_what_is_larger_has_to_be_received() -> None:
    trial = trial_of({"txt": b"7"}, {"npy": bytes(10_000_000)})
    assert not trial.gives_pictures
    assert trial.saved_seconds == pytest.approx(0.002 - 9_999_999 * 0.4e-9)
    assert not trial.pays
