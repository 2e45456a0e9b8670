"""stub"""
import os, pathlib
def resolve(repo_id, filename, repo_type="model"):
    return pathlib.Path(os.environ["RLHF_NB_MIRROR"]) / repo_id / filename
