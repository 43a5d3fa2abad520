"""Frames to and from python-can's messages."""

from __future__ import annotations

import can

from edged_can.frames import Frame


def to_message(frame: Frame) -> can.Message:
    """With CAN FD its data go at the second bit rate."""
    return can.Message(
        arbitration_id=frame.id,
        data=frame.data,
        is_extended_id=frame.extended,
        is_fd=frame.fd,
        bitrate_switch=frame.fd,
    )


def to_frame(message: can.Message) -> Frame:
    """Of a data frame that came."""
    return Frame(message.arbitration_id, bytes(message.data), message.is_extended_id, message.is_fd)
