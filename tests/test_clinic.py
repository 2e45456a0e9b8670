"""The clinic over an invented recording: nothing is given away, questions and guesses cost what they should."""

import pytest

from rlhf_nb_utils import ablations, clinic
from rlhf_nb_utils.clinic import Clinic, ClinicError
from rlhf_nb_utils.mistakes import DIAGNOSTICS, HEALTHY, MISTAKES

WATCHED = {"positive": 0.9, "kl": 7.0, "length": 20.0, "eos_rate": 1.0}


def invented_run(level, iterations=11, **changes):
    curves = {key: [level + i for i in range(iterations)] for key in DIAGNOSTICS}
    run = {"settings": {}, "curves": curves, "watched": WATCHED, "samples": [["It was", f" {level}."]] * 4, "stopped": None}
    return run | changes


def recording():
    runs = {HEALTHY: invented_run(0.0)} | {name: invented_run(100.0 * (i + 1)) for i, name in enumerate(MISTAKES)}
    return {"recipe": {}, "runs": runs}


def the_case(clinic, name):
    """The case that has this mistake, found without asking: which letter it bears depends on the seed."""
    return next(case for case in clinic.cases if case._name == name)


def test_the_order_is_drawn_by_the_seed_and_gives_nothing_away():
    one, same, other = (Clinic(recording(), seed) for seed in (0, 0, 1))
    orders = [[case._name for case in c.cases] for c in (one, same, other)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(MISTAKES)
    assert list(MISTAKES) not in orders and list(one.names) == sorted(MISTAKES)
    assert [case.label for case in one.cases] == list("ABCDEFGHIJKL") and one["C"] is one.cases[2]
    shown = "".join([one.report(), *(str(case.ask("kl")) + str(case.ask("samples")) for case in one.cases)])
    assert not [name for name in MISTAKES if name in shown]


def test_a_symptom_is_shown_beside_the_healthy_run_without_playing():
    made_up = recording()
    sick, healthy = clinic.beside(made_up, "no KL penalty", "kl", "score")
    assert list(sick) == list(healthy) == ["kl", "score"]
    assert sick["kl"] == made_up["runs"]["no KL penalty"]["curves"]["kl"] and healthy["kl"] == list(range(11))
    for name, question, told in (("no PPO", "kl", "no run is recorded as 'no PPO'"), ("no KL penalty", "mood", "'mood'")):
        with pytest.raises(ClinicError, match=told):
            clinic.beside(made_up, name, question)
    with pytest.raises(ClinicError, match="there are none"):
        clinic.beside({}, "no KL penalty", "kl")


def test_an_answer_is_the_curve_beside_the_healthy_one():
    made_up = recording()
    case = the_case(Clinic(made_up), "no KL penalty")
    answer = case.ask("kl")
    assert answer.sick == made_up["runs"]["no KL penalty"]["curves"]["kl"]
    assert answer.healthy == made_up["runs"][HEALTHY]["curves"]["kl"] == list(range(11))
    title, iterations, sick, healthy = str(answer).splitlines()
    assert title.startswith("kl: ") and iterations.split() == ["iteration", "1", "3", "5", "7", "9", "11"]
    assert sick.split()[:4] == ["case", case.label, "700", "702"]
    assert healthy.split() == ["healthy", "0", "2", "4", "6", "8", "10"]
    samples = case.ask("samples")
    assert samples.sick[0] == ["It was", " 700.0."] and f"case {case.label}: It was ▸ 700.0." in str(samples)


def test_a_run_that_broke_off_has_a_shorter_curve():
    made_up = recording()
    dead = invented_run(5.0, 3, watched=None, stopped="PPO stopped at iteration 4: loss nan")
    dead["curves"]["kl"][1] = None
    made_up["runs"]["rate ten times too high"] = dead
    case = the_case(Clinic(made_up), "rate ten times too high")
    assert str(case.ask("kl")).splitlines()[2].split()[2:] == ["5", "7", "–", "–", "–", "–"]
    assert "–" in str(case.ask("kl")) and len(case.ask("kl").sick) == 3
    assert case.diagnose("rate ten times too high").text.endswith("The run broke off: PPO stopped at iteration 4: loss nan")


def test_three_questions_are_free_and_each_further_one_costs_a_point():
    case = Clinic(recording())["A"]
    points = []
    for question in ["kl", "kl", "entropy", "ratio", "length", "samples", "length"]:
        case.ask(question)
        points.append(case.points)
    assert points == [10, 10, 10, 10, 9, 8, 8]
    assert case.asked == ["kl", "entropy", "ratio", "length", "samples"]


def test_a_wrong_guess_costs_three_points_once_and_says_what_that_mistake_would_show():
    case = the_case(Clinic(recording()), "no KL penalty")
    verdict = case.diagnose("labels swapped")
    assert not verdict.right and verdict.points == case.points == 7 and not case.closed
    assert MISTAKES["labels swapped"].sees in str(verdict) and "no KL penalty" not in str(verdict)
    assert case.diagnose("labels swapped").points == 7
    for name in MISTAKES:
        if name != "no KL penalty":
            case.diagnose(name)
    assert case.points == 1
    assert case.diagnose("no KL penalty").right and case.points == 1


def test_the_right_diagnosis_is_explained_measured_and_closes_the_case():
    made_up = recording()
    made_up["runs"]["no KL penalty"] |= {"settings": {"ppo.kl_coef": 0.0}, "watched": WATCHED | {"positive": 0.97, "kl": 30.0}}
    clinic_ = Clinic(made_up)
    case, mistake = the_case(clinic_, "no KL penalty"), MISTAKES["no KL penalty"]
    case.ask("kl")
    verdict = case.diagnose("no KL penalty")
    assert verdict.right and verdict.points == clinic_.points == 10 and case.solved and case.closed
    assert all(text in verdict.text for text in (mistake.wrong, mistake.sees, mistake.cure, "ppo.kl_coef = 0.0"))
    assert "97% positive by the annotator, at an exact KL of 30.0 nats; healthy, 90%" in verdict.text
    for question in DIAGNOSTICS:  # to look around in, at no cost
        case.ask(question)
    assert case.asked == ["kl"] and case.points == 10
    with pytest.raises(ClinicError, match=f"case {case.label} is closed, it was 'no KL penalty'"):
        case.diagnose("labels swapped")


def test_giving_up_tells_the_answer_for_no_points():
    case = the_case(Clinic(recording()), "KL sign inverted")
    case.diagnose("labels swapped")
    verdict = case.give_up()
    assert verdict.text.startswith("It was KL sign inverted. ") and not verdict.right
    assert (verdict.points, case.points, case.closed, case.solved) == (0, 0, True, False)
    with pytest.raises(ClinicError, match="closed"):
        case.give_up()


def test_the_report_counts_and_names_closed_cases_only():
    clinic_ = Clinic({"runs": {name: recording()["runs"][name] for name in (HEALTHY, "labels swapped", "no KL penalty")}})
    assert clinic_.names == ("labels swapped", "no KL penalty")
    first, second = (the_case(clinic_, name) for name in clinic_.names)
    first.ask("kl")
    first.diagnose("no KL penalty")
    lines = clinic_.report().splitlines()
    assert f"| {first.label} | 1 | 1 | open | – |" in lines and lines[-1] == "| all | | | | 0 of 20 |"
    first.diagnose("labels swapped")
    second.give_up()
    lines = clinic_.report().splitlines()
    assert f"| {first.label} | 1 | 1 | labels swapped | 7 |" in lines
    assert f"| {second.label} | 0 | 0 | no KL penalty (given up) | 0 |" in lines and lines[-1] == "| all | | | | 7 of 20 |"


def test_the_handbook_lists_every_diagnosis():
    lines = Clinic(recording()).handbook().splitlines()
    assert len(lines) == 14 and all(line.count("|") == 5 for line in lines)
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == sorted(MISTAKES)


def test_bad_names_are_refused_in_one_line():
    clinic_ = Clinic(recording())
    case = clinic_["A"]
    for call, message in [
        (lambda: case.ask("KL"), "no diagnostic is called 'KL'; ask for one of score, "),
        (lambda: case.diagnose("flu"), "no mistake is called 'flu'; choose from EOS lost"),
        (lambda: clinic_["Z"], "there is no case 'Z'; there are A to L"),
    ]:
        with pytest.raises(ClinicError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert not case.asked and not case.guesses


def test_a_recording_that_is_none_is_refused(tmp_path, monkeypatch):
    runs = recording()["runs"]
    for wrong in ({}, {"runs": {HEALTHY: runs[HEALTHY]}}, {"runs": {"labels swapped": runs[HEALTHY]}}):
        with pytest.raises(ClinicError, match="no recording"):
            Clinic(wrong)
    with pytest.raises(ClinicError, match="'flu', which is no mistake here"):
        Clinic({"runs": runs | {"flu": runs[HEALTHY]}})
    monkeypatch.setattr(ablations, "RECORDED", tmp_path)
    with pytest.raises(ablations.AblationError, match="clinic.json is missing"):
        clinic.load()
