"""Start Ray in a test, and find its processes. Needs Ray, which brings psutil."""


def start() -> None:
    """Start Ray on this machine; again where its own processes took longer to start than the 30 s it gives them."""
    import ray

    for tries in range(4):
        try:
            ray.init(num_cpus=2, object_store_memory=100 << 20, include_dashboard=False)
            return
        except Exception as error:
            if "timed out during startup" not in str(error) or tries == 3:
                raise
            ray.shutdown()


def named(text: str) -> list[int]:
    """Return the ids of this process' descendants with `text` in their command line."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended meanwhile, and may be left as a zombie
            continue
        if text in line:
            found.append(process.pid)
    return found
