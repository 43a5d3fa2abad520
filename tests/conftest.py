"""What every test may use."""

pytest_plugins = ["edged.testing.pytest_plugin"]
