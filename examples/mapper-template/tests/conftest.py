pytest_plugins = ["edged.testing.pytest_plugin"]
