"""Say which wmi is tested, and know the option for the long runs."""

import os
import sys

# In a checkout, the file beside tests/. tox sets WMI_INSTALLED: there it is the installed wheel.
if not os.environ.get("WMI_INSTALLED"):
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def pytest_addoption(parser):
    """Offer --long; what it runs more often is still a fixed number of times."""
    parser.addoption("--long", action="store_true", help="hundreds of kills and mutations instead of a few")


def pytest_report_header():
    """Show what is tested."""
    import wmi

    return f"wmi: {wmi.__version__} from {wmi.__file__}"
