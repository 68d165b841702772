"""What a run left behind, as numbers and as a picture: read from the run folder, never from a running program."""

from fedtune.report.record import ClientRecord, RoundRecord, RunRecord, collect
from fedtune.report.write import write_report

__all__ = ["ClientRecord", "RoundRecord", "RunRecord", "collect", "write_report"]
