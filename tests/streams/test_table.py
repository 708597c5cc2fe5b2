"""Tasks of one's own: which files, labels and tasks a table stands for."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lifelong_ens.errors import InputError
from streams import image_table

SIZE = 4


@pytest.fixture
def make_table(tmp_path):
    """Returns a function that writes a table, and the images it names: each is of one grey, from 1 in its order."""

    def make(rows: list[str], header: str = "path,label,task", name: str = "my.csv") -> Path:
        for path in {line.split(",")[0].strip(): None for line in rows if line.strip(",")}:
            file = tmp_path / "photos" / path
            if path and not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                grey = 1 + len(list((tmp_path / "photos").rglob("*.png")))
                Image.new("L", (6, 5), grey).save(file)
        table = tmp_path / "photos" / name
        table.parent.mkdir(exist_ok=True)
        table.write_text("\n".join([header, *rows]) + "\n")
        return table

    return make


def shown(benchmark, stream: str = "train") -> list[list[tuple[int, str]]]:
    """Of every task the grey of each image with the name of its label."""
    tasks = []
    for names, experience in zip(benchmark.class_names, benchmark.streams[stream], strict=True):
        data = experience.dataset.image_data
        greys = data.images[data.rows][:, 0, 0, 0].tolist()
        tasks.append([(grey, names[label]) for grey, label in zip(greys, data.labels.tolist(), strict=True)])
    return tasks


WITH_SPLIT = "path,label,task,split"
SPLIT = [
    "a.png,cat,night,train",
    "b.png,dog,night,train",
    "c.png,cat,day,train",
    "d.png,cat,night,test",
    "e.png,dog,night,test",
    "f.png,cat,day,test",
    "g.png,elk,day,train",
    "sub/h.png,elk,day,test",
]


def test_rows_become_tasks_in_order_of_appearance(make_table):
    benchmark = image_table(table=make_table(SPLIT, WITH_SPLIT), image_size=SIZE)
    assert shown(benchmark) == [[(1, "cat"), (2, "dog")], [(3, "cat"), (7, "elk")]]
    assert shown(benchmark, "test") == [[(4, "cat"), (5, "dog")], [(6, "cat"), (8, "elk")]]
    assert benchmark.task_names == ["night", "day"]
    # the cat is one class of the stream, wherever it occurs
    assert benchmark.classes == [[0, 1], [0, 2]]
    assert [e.dataset.batch(torch.arange(2))[2].tolist() for e in benchmark.train_stream] == [[0, 0], [1, 1]]
    assert benchmark.image_shape == (3, SIZE, SIZE)


def test_numbers_are_ordered_and_all_else_is_text(make_table):
    rows = [
        f"{task}_{label}_{n}.png,{label},{task}" for task in (10, 9) for label in (2, 10, 1) for n in "ab"
    ]
    benchmark = image_table(table=make_table(rows), image_size=SIZE, test_fraction=0.5)
    assert benchmark.task_names == ["9", "10"]
    assert benchmark.class_names == [["1", "2", "10"]] * 2
    assert [sorted(label for _, label in task) for task in shown(benchmark)] == [["1", "10", "2"]] * 2
    rows = [f"x{label}{n}.png,{label},1" for label in ("007", "NA", "7", "None") for n in "ab"]
    benchmark = image_table(table=make_table(rows), image_size=SIZE)
    assert sorted(benchmark.class_names[0]) == ["007", "7", "NA", "None"]


def test_one_domain_after_another_has_the_same_labels(make_table):
    rows = [f"{t}{c}{n}.png,{c},{t}" for t in ("photo", "sketch") for c in ("dog", "cat") for n in range(4)]
    rows.reverse()
    benchmark = image_table(table=make_table(rows), image_size=SIZE, validation=0.34)
    assert benchmark.task_names == ["sketch", "photo"]
    assert benchmark.classes == [[0, 1], [0, 1]]
    assert benchmark.class_names == [["cat", "dog"]] * 2
    parts = [shown(benchmark, stream) for stream in ("train", "valid", "test")]
    assert [[len(task) for task in part] for part in parts] == [[4, 4], [2, 2], [2, 2]]
    assert sorted(grey for part in parts for task in part for grey, _ in task) == list(range(1, 17))
    for part in parts:
        for number, task in enumerate(part):
            for grey, label in task:
                assert rows[grey - 1].split(",")[1:] == [label, benchmark.task_names[number]]
            assert {label for _, label in task} == {"cat", "dog"}


def test_marked_validation_images_are_those_of_the_table(make_table):
    rows = [*SPLIT, "v.png,cat,night,validation", "w.png,elk,day,validation"]
    table = make_table(rows, WITH_SPLIT)
    benchmark = image_table(table=table, image_size=SIZE, validation=0.3)
    assert shown(benchmark, "valid") == [[(9, "cat")], [(10, "elk")]]
    assert [len(task) for task in shown(benchmark)] == [2, 2]
    # they take no part in normalising either
    assert benchmark.train_stream[0].dataset.image_data.mean[0].item() == pytest.approx((1 + 2 + 3 + 7) / 4)


def test_first_tasks_and_limit(make_table):
    rows = [f"{task}{n}.png,cat,{task}" for task in ("x", "y", "z") for n in range(5)]
    benchmark = image_table(table=make_table(rows), image_size=SIZE, num_tasks=2, limit=2)
    assert [len(task) for task in shown(benchmark)] == [2, 2]
    assert benchmark.task_names == ["x", "y"]


def test_paths_start_from_root_and_spaces_do_not_matter(make_table, tmp_path):
    rows = ["a.png , cat, 1 ", " b.png, cat ,1", ",,", "", "c.png,dog,1", "d.png,dog,1"]
    table = shutil.move(make_table(rows, " path, label ,task"), tmp_path / "elsewhere.csv")
    benchmark = image_table(table=table, root=tmp_path / "photos", image_size=SIZE, test_fraction=0.5)
    assert sorted(shown(benchmark)[0] + shown(benchmark, "test")[0]) == [
        (1, "cat"),
        (2, "cat"),
        (3, "dog"),
        (4, "dog"),
    ]


def test_an_image_may_be_in_several_tasks(make_table):
    rows = ["a.png,cat,kind,train", "b.png,dog,kind,train", "c.png,cat,kind,test", "d.png,dog,kind,test"]
    rows += ["a.png,black,colour,train", "c.png,black,colour,test"]
    benchmark = image_table(table=make_table(rows, WITH_SPLIT), image_size=SIZE)
    assert shown(benchmark) == [[(1, "cat"), (2, "dog")], [(1, "black")]]


def test_a_changed_label_or_split_is_read_anew(make_table):
    first = image_table(table=make_table(SPLIT, WITH_SPLIT), image_size=SIZE)
    again = image_table(table=make_table(SPLIT, WITH_SPLIT), image_size=SIZE)
    assert shown(again) == shown(first)
    changed = [
        line.replace("b.png,dog", "b.png,cat").replace("elk,day,train", "elk,day,test") for line in SPLIT
    ]
    changed += ["i.png,dog,night,train", "j.png,elk,day,train"]
    benchmark = image_table(table=make_table(changed, WITH_SPLIT), image_size=SIZE)
    assert shown(benchmark) == [[(1, "cat"), (2, "cat"), (9, "dog")], [(3, "cat"), (10, "elk")]]
    assert shown(benchmark, "test")[1] == [(6, "cat"), (7, "elk"), (8, "elk")]


A, B = "a.png,cat,1", "b.png,cat,1"


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([A, B], "path,lable,task", "has no column label; did you mean lable?"),
        ([A, B], "file,label,task", "has no column path; choose from file, label, task"),
        (["a;cat;1.png"], "path;label;task", "has no column path; choose from path;label;task"),
        ([A, B, "", ",dog,1"], None, "my.csv, line 5 has no path; fill it in or remove the line"),
        ([A, "b.png,nan,1"], None, "line 3 has no label"),
        ([A, "b.png,cat"], None, "line 3 has no task"),
        ([], None, "has no rows"),
        (
            [A, B, "b.png,cat,1,2"],
            None,
            "Expected 3 fields in line 4, saw 4)",
        ),
        ([A + ",x"], None, "is no whole csv file"),
        ([A], None, "class cat of task 1 has one sample"),
        (
            [A, A],
            None,
            "line 3: {}/a.png is in {}/my.csv, line 2 too, and would be trained on and tested with",
        ),
        ([A, B, "a.png,cat,2"], None, "line 4: {}/a.png is in {}/my.csv, line 2 too"),
        ([A + ",train", "./" + A + ",test"], WITH_SPLIT, "line 3: {}/a.png is in"),
        (
            [A + ",train", B + ",tset"],
            WITH_SPLIT,
            "line 3 has the split 'tset'; expected train, test, validation",
        ),
        ([A + ",train", B + ","], WITH_SPLIT, "line 3 has no split"),
        ([A + ",train", B + ",train"], WITH_SPLIT, "line 2: task 1 has no test images"),
        (
            [A + ",train", B + ",test", "c.png,elk,1,test"],
            WITH_SPLIT,
            "line 4: label elk of task 1 has no train image",
        ),
        (
            [A + ",train", B + ",test", "c.png,elk,1,train"],
            WITH_SPLIT,
            "line 4: label elk of task 1 has no test image",
        ),
        (
            [A + ",train", B + ",test", "c.png,cat,2,test"],
            WITH_SPLIT,
            "line 4: task 2 has no train images",
        ),
        (
            [*SPLIT, "v.png,cat,night,validation"],
            WITH_SPLIT,
            "line 4: task day has no validation images",
        ),
    ],
)
def test_bad_tables_are_one_line(make_table, tmp_path, rows, header, message):
    table = make_table(rows, header or "path,label,task")
    with pytest.raises(InputError) as caught:
        image_table(table=table, image_size=SIZE)
    assert message.replace("{}", str(table.parent)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_bad_arguments(make_table, tmp_path):
    table = make_table([A, B])
    (table.parent / "b.png").unlink()
    with pytest.raises(
        InputError, match=r"line 3: .*b\.png cannot be read \(No such file .* remove the line"
    ):
        image_table(table=table)
    with pytest.raises(InputError, match=r"the table .*no\.csv cannot be read"):
        image_table(table=tmp_path / "no.csv")
    with pytest.raises(InputError, match=r"ends in \.csv or \.parquet"):
        image_table(table=table.rename(table.with_suffix(".txt")))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(InputError, match=r"empty\.csv is no whole csv file"):
        image_table(table=tmp_path / "empty.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"b\.csv is no whole csv file"):
        image_table(table=tmp_path / "b.csv")
    with pytest.raises(InputError, match="num_tasks is 3 but there are 1 tasks"):
        image_table(table=make_table([A, B]), num_tasks=3)
    rows = [f"{path},cat,{task},train" for task in "12" for path in ("a.png", "b.png")]
    rows += [f"{path},cat,{task},test" for task in "12" for path in ("c.png", "d.png")]
    table = make_table(rows, WITH_SPLIT)
    image_table(table=table, image_size=SIZE)
    with pytest.raises(InputError, match=r"line 4: .*a\.png is in .*line 2 too.*mark validation images"):
        image_table(table=table, image_size=SIZE, validation=0.5)


def test_parquet_without_pyarrow_names_it(tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *rest, **more):
        if name.partition(".")[0] in ("pyarrow", "fastparquet"):
            raise ImportError(name)
        return original(name, *rest, **more)

    (tmp_path / "my.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="pip install pyarrow, or save the table as CSV"):
        image_table(table=tmp_path / "my.parquet")


def test_parquet_says_what_csv_does(make_table):
    pytest.importorskip("pyarrow")
    csv_file = make_table(SPLIT, WITH_SPLIT)
    frame = pd.read_csv(csv_file)
    # numbers as numbers, with a gap as pandas has them
    frame["task"] = frame["task"].map({"night": 2.0, "day": 10.0})
    frame["label"] = frame["label"].astype("category")
    frame.to_parquet(csv_file.with_suffix(".parquet"))
    benchmark = image_table(table=csv_file.with_suffix(".parquet"), image_size=SIZE)
    assert shown(benchmark) == [[(1, "cat"), (2, "dog")], [(3, "cat"), (7, "elk")]]
    assert benchmark.task_names == ["2", "10"]
    frame.loc[2, "task"] = np.nan
    frame.to_parquet(csv_file.with_suffix(".parquet"))
    with pytest.raises(InputError, match=r"my\.parquet, row 3 has no task"):
        image_table(table=csv_file.with_suffix(".parquet"))
    csv_file.with_suffix(".parquet").write_bytes(b"PAR1 and so on")
    with pytest.raises(InputError, match="is no whole parquet file"):
        image_table(table=csv_file.with_suffix(".parquet"))
