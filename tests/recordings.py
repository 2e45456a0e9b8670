"""Recordings made up for tests of what replays them."""

from rlhf_nb_utils.mistakes import DIAGNOSTICS, HEALTHY


def made_up(points) -> dict:
    """A recording whose numbers tell which run and step they are of: reward = step + β, kl = reward / 2."""
    runs = []
    for point in points:
        reward = [step + point.beta for step in range(1, point.steps + 1)]
        run = {"sft_loss": [3.5, 3.25], "comparisons": 5000, "accuracy": 0.8, "reward": reward}
        run |= {"kl": [r / 2 for r in reward], "entropy": [2.0] * point.steps}
        runs.append(point._asdict() | run | {"text": [f" <b>said</b> after {step}" for step in range(point.steps + 1)]})
    return {"recipe": {}, "prompt": "This film", "runs": runs}


def sick_runs() -> dict:
    """A recording of two sick runs and a healthy one; one log number of the first was not finite."""
    runs = {}
    for level, name in enumerate((HEALTHY, "no KL penalty", "KL sign inverted")):
        curves = {key: [float(level), level + 1.0, None if level == 1 else level + 2.0] for key in DIAGNOSTICS}
        samples = [["It was", f" <i>{level}</i>."]]
        runs[name] = {"settings": {}, "curves": curves, "watched": None, "samples": samples, "stopped": None}
    return {"recipe": {}, "runs": runs}
