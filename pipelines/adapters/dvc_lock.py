"""Tell DVC that stages are done whose outputs something else has made."""

from collections.abc import Sequence

from wtflow.errors import WTFlowError


def commit(stages: Sequence[str]) -> None:
    """As `dvc commit --force <stages>`, with the same bytes, in the project of the current folder.

    The command writes dvc.lock anew for each of them, seconds every time in a project of many lines; here it is
    written once.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo, lock_repo

    try:
        with Repo() as repo, lock_repo(repo):
            # from the index, which reads dvc.lock once; asked for by its name, a stage has it read again
            by_name = {stage.addressing: stage for stage in repo.index.stages}
            if missing := set(stages) - set(by_name):
                raise DvcException(f"{', '.join(sorted(missing))}: not in dvc.yaml")
            found = [by_name[name] for name in stages]
            for stage in found:
                stage.save()
                stage.commit()
            if found:
                found[0].dvcfile.dump_stages(found, update_pipeline=False)
    except DvcException as error:
        raise WTFlowError(f"dvc.lock: {', '.join(stages)} could not be noted as done: {error}") from error
