"""ROS 2's messages over DDS: names, and the bytes on the wire."""

import dataclasses
import struct
import time

import numpy as np
import pytest

pytest.importorskip("cyclonedds", reason="needs the extra dds")

from cyclonedds.idl import IdlStruct, types

from worldvln_edge.ros_bridge.ports import dds_types as dds
from worldvln_edge.ros_bridge.ports.dds_wire import DdsWire
from worldvln_edge.ros_bridge.ports.messages import MessageBuilder, ns_of_time
from worldvln_edge.ros_bridge.ports.topics import TopicsConfig

_HEADER = dds.Header(stamp=dds.Time(sec=5, nanosec=7), frame_id="camera")


@dataclasses.dataclass
class _PlainImage(IdlStruct):
    """sensor_msgs/Image as the binding itself writes it."""

    header: dds.Header
    height: types.uint32
    width: types.uint32
    encoding: str
    is_bigendian: types.uint8
    step: types.uint32
    data: types.sequence[types.uint8]


@pytest.mark.parametrize("use_version_2", [False, True])
@pytest.mark.parametrize("encoding", ["rgb8", "bgra8", "mono8 "])
@pytest.mark.parametrize("length", [0, 1, 5, 768])
def test_an_image_is_written_as_the_binding_writes_it(use_version_2, encoding, length):
    pixels = bytes(index % 251 for index in range(length))
    fields = (_HEADER, 1, length, encoding, 0, length)
    expected = _PlainImage(*fields, list(pixels)).serialize(use_version_2=use_version_2)
    image = dds.Image(*fields, pixels)
    assert image.serialize(use_version_2=use_version_2) == expected
    back = dds.Image.deserialize(expected)
    assert bytes(back.data) == pixels
    assert dataclasses.replace(back, data=pixels) == image


def test_an_image_in_big_endian_is_read():
    sample = b"\0\0\0\0" + struct.pack(">iII4sIII6sBxII3s", 5, 7, 4, b"cam", 1, 3, 6, b"mono8", 0, 3, 3, b"abc")
    image = dds.Image.deserialize(sample)
    assert (image.header.stamp.nanosec, image.header.frame_id, image.width, image.encoding) == (7, "cam", 3, "mono8")
    assert (image.step, bytes(image.data)) == (3, b"abc")


def test_a_sample_that_is_cut_off_is_refused():
    whole = dds.CompressedImage(_HEADER, "jpeg", b"0123456789").serialize()
    with pytest.raises(ValueError, match="sample of CompressedImage has 8 of 10 bytes"):
        dds.CompressedImage.deserialize(whole[:-2])


def test_pixels_are_not_touched_one_by_one():
    pixels = np.zeros((480, 640, 3), np.uint8).tobytes()
    image = dds.Image(_HEADER, 480, 640, "rgb8", 0, 1920, pixels)
    began = time.process_time()
    for _ in range(10):
        dds.Image.deserialize(image.serialize())
    assert time.process_time() - began < 0.3  # with a list for the bytes: 0.7 s


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (dds.Image, "sensor_msgs::msg::dds_::Image_"),
        (dds.CompressedImage, "sensor_msgs::msg::dds_::CompressedImage_"),
        (dds.Path, "nav_msgs::msg::dds_::Path_"),
        (dds.Odometry, "nav_msgs::msg::dds_::Odometry_"),
        (dds.TwistStamped, "geometry_msgs::msg::dds_::TwistStamped_"),
        (dds.PoseStamped, "geometry_msgs::msg::dds_::PoseStamped_"),
        (dds.String, "std_msgs::msg::dds_::String_"),
        (dds.DiagnosticArray, "diagnostic_msgs::msg::dds_::DiagnosticArray_"),
        (dds.Clock, "rosgraph_msgs::msg::dds_::Clock_"),
    ],
)
def test_types_have_the_names_that_ros_2_gives_them(kind, name):
    assert kind.__idl_typename__.replace(".", "::") == name


def test_topics_have_the_names_that_ros_2_gives_them():
    assert dds.topic_name("/camera/image_raw") == "rt/camera/image_raw"


def test_times_are_whole_nanoseconds_both_ways():
    at_ns = 1_700_000_000_123_456_789
    assert ns_of_time(MessageBuilder(DdsWire.types, TopicsConfig(), lambda: at_ns).header().stamp) == at_ns
