"""The rates that `jaxinfer generate` prints."""

from jaxinfer.commands.generate.rates import Mark


def test_rates_leave_compilation_out():
    assert Mark(12.0, 5.5).rate(30, Mark(10.0, 5.0)) == "20.0 tok/s"


def test_there_is_no_rate_where_compilation_took_all_the_time():
    """Programs that were compiled at once count more seconds than passed."""
    assert Mark(12.0, 8.0).rate(30, Mark(10.0, 5.0)) == "too short to say"
