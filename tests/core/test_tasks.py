import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldvln_edge.tasks import (
    SceneRef,
    Task,
    TaskFileError,
    read_task,
    read_task_list,
    task_from_json,
    write_task,
    write_task_list,
)

START = [100.0, -50.0, 300.0, 0.0, 90.0, 0.0]
TASK = Task(
    instruction="fly forward 6 meters",
    initial_pos=tuple(START),
    task_id="a",
    end_pos=(0.0, 1.0, 2.0, 0.0, 90.0, 0.0),
    reference_path_raw=(tuple(START), tuple(START)),
    kind="forward",
    magnitude=(6.0,),
    scene=SceneRef(family="city", seed=3),
)


def _write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_task_comes_back_from_its_file(tmp_path):
    write_task(TASK, tmp_path / "a.json")
    assert read_task(tmp_path / "a.json") == TASK


def test_a_list_of_tasks_comes_back_from_one_file_and_from_a_folder(tmp_path):
    other = Task(instruction="climb 2 meters", initial_pos=tuple(START), task_id="b")
    write_task_list([TASK, other], tmp_path / "list.json")
    assert read_task_list(tmp_path / "list.json") == [TASK, other]
    write_task(other, tmp_path / "folder" / "b.json")
    write_task(TASK, tmp_path / "folder" / "a.json")
    assert read_task_list(tmp_path / "folder") == [TASK, other]
    assert read_task_list(tmp_path / "folder" / "a.json") == [TASK]


def test_a_foreign_evaluation_file_loads_and_takes_its_id_from_the_file_name(tmp_path):
    record = {
        "instruction": "  ",
        "instruction_unified": "Fly around the man",
        "initial_pos": [*START, 1.0],
        "use_obj": 1,
        "obj_id": 7,
        "target_pos": [1, 2, 3],
        "obj_pos": [4, 5, 6],
        "something_else": {"deep": [1]},
    }
    task = read_task(_write(tmp_path / "task_12.json", record))
    assert (task.task_id, task.instruction) == ("task_12", "Fly around the man")
    assert task.initial_pos == tuple(START)
    assert task.target_pos == (4.0, 5.0, 6.0, 0.0, 0.0, 0.0)
    assert task.scene is None


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "a list of 0 tasks"),
        (3, "must be a JSON object, found a number"),
        ({"initial_pos": START}, "no instruction"),
        ({"instruction": " ", "initial_pos": START}, "no instruction"),
        ({"instruction": "go"}, '"initial_pos" is missing'),
        ({"instruction": "go", "initial_pos": START[:5]}, "6 finite numbers"),
        ({"instruction": "go", "initial_pos": [*START[:5], "1"]}, "6 finite numbers"),
        ({"instruction": "go", "initial_pos": [*START[:5], True]}, "6 finite numbers"),
        ({"instruction": "go", "initial_pos": START, "end_pos": [1]}, '"end_pos"'),
        ({"instruction": "go", "initial_pos": START, "reference_path_raw": [START, [1]]}, r"reference_path_raw\[1\]"),
        ({"instruction": "go", "initial_pos": START, "reference_path_raw": {"a": 1}}, "must be a list of poses"),
        ({"instruction": "go", "initial_pos": START, "scene": {"family": "city"}}, "seed"),
        ("{", "not JSON"),
        ('{"instruction": "go", "initial_pos": [NaN,0,0,0,0,0]}', "not JSON"),
    ],
)
def test_a_bad_task_file_says_which_file_and_what_is_wrong(tmp_path, record, message):
    path = _write(tmp_path / "bad.json", record)
    with pytest.raises(TaskFileError, match=message) as caught:
        read_task(path)
    assert "bad.json" in str(caught.value)


def test_a_bad_task_in_a_list_is_named_by_its_position(tmp_path):
    path = _write(tmp_path / "list.json", [{"instruction": "go", "initial_pos": START}, {"instruction": "go"}])
    with pytest.raises(TaskFileError, match="task 1"):
        read_task_list(path)


def test_a_missing_file_or_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(TaskFileError, match="no such file"):
        read_task(tmp_path / "none.json")
    with pytest.raises(TaskFileError, match="holds no"):
        read_task_list(tmp_path)


_text = st.text(alphabet="ab1 ", max_size=5)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _text,
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=12,
)
_keys = st.sampled_from(
    ["instruction", "initial_pos", "end_pos", "target_pos", "obj_pos", "obj_rot", "reference_path_raw", "scene",
     "success", "magnitude", "task_id", "seed", "use_obj"]
)  # fmt: skip


@given(st.dictionaries(_keys, _json | st.lists(st.integers() | st.floats(), min_size=6, max_size=6)))
def test_any_json_is_either_a_task_with_a_finite_start_or_a_task_file_error(record):
    try:
        task = task_from_json({"instruction": "go", **record})
    except TaskFileError:
        return
    assert task.instruction.strip()
    assert all(math.isfinite(value) for value in task.initial_pos)
