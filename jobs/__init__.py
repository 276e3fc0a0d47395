"""What users launch: the command, the scripts, the demo, and the recipes."""

if __name__ == "jobs":
    raise ImportError("`jobs` is imported as `teachercache.jobs`")
