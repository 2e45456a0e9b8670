"""Recordings made up for tests of what replays them."""


def made_up(points) -> dict:
    """A recording whose numbers tell which run and step they are of: reward = step + β, kl = reward / 2."""
    runs = []
    for point in points:
        reward = [step + point.beta for step in range(1, point.steps + 1)]
        run = {"sft_loss": [3.5, 3.25], "comparisons": 5000, "accuracy": 0.8, "reward": reward}
        run |= {"kl": [r / 2 for r in reward], "entropy": [2.0] * point.steps}
        runs.append(point._asdict() | run | {"text": [f" <b>said</b> after {step}" for step in range(point.steps + 1)]})
    return {"recipe": {}, "prompt": "This film", "runs": runs}
