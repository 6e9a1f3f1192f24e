"""Worker processes: a process that dies costs its video, not the job."""

import os

from data_pipelines.prepare import clips, crop, filters, processing


def no_landmarker(model):
    pass


def dies_at_bert(job):
    if job.naming.name == "bert":
        os._exit(9)
    return filters.Verdict(job.path, True, frames=3)


def test_a_dying_process_costs_its_video(tmp_path, monkeypatch):
    monkeypatch.setattr(processing, "_start", no_landmarker)
    monkeypatch.setattr(processing, "_look_at", dies_at_bert)
    jobs = []
    for name in ("anna", "bert", "carl"):
        (tmp_path / name).write_text(name)
        naming = clips.Naming.of(tmp_path / name)
        jobs.append(processing.Job(str(tmp_path / name), naming, crop.Settings(), None, tmp_path))
    said = []
    verdicts = processing.process(jobs, "", 2, said.append)
    assert [verdict.kept for verdict in verdicts] == [True, False, True]
    assert verdicts[1].words() == "dropped: failed: its process died"
    assert len(said) == 3 and said[-1].startswith("3/3")
