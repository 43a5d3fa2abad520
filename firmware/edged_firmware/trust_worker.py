"""The process behind ``trust.verify_in_child``: a request as JSON on stdin, a report or an error on stdout.

Exit codes: 0 report, 3 an error of the tree (as JSON); anything else is a fault of this program.
"""

from __future__ import annotations

import json
import math
import signal
import sys

from edged_firmware.errors import EdgedError
from edged_firmware.trust import EXIT_ERROR, EXIT_REPORT, TrustRequest, error_to_json, verify


def main() -> int:
    """Answer one request. Returns the exit code."""
    request = TrustRequest.from_json(json.load(sys.stdin))
    # For the case that the parent was killed and nobody is left to enforce the time-out.
    signal.alarm(math.ceil(request.timeout_s) + 1)
    try:
        answer = verify(request).to_json()
    except EdgedError as error:
        json.dump(error_to_json(error), sys.stdout)
        return EXIT_ERROR
    json.dump(answer, sys.stdout)
    return EXIT_REPORT


if __name__ == "__main__":
    sys.exit(main())
