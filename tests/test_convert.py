"""Public data sets' folders to lists: each on a small folder of its layout, made here."""
import json

import pytest
from test_lists import write_wav

from data import convert
from data.lists import QuestionList
from lib.audio import load_audio


def write_csv(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_clips(folder, *names):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_wav(folder / name, 0.1, seed=seed)


def make_fsdd(folder):
    write_clips(folder, *(f"recordings/{digit}_{speaker}_{index}.wav" for digit in (3, 7)
                          for speaker in ("ann", "bob") for index in (4, 5)))


def make_esc50(folder):
    write_csv(folder / "meta" / "esc50.csv", "filename,fold,target,category,esc10,src_file,take",
              "1-1-A-0.wav,1,0,dog,True,1,A", "5-2-A-1.wav,5,1,chirping_birds,False,2,A")
    write_clips(folder, "audio/1-1-A-0.wav", "audio/5-2-A-1.wav")


def make_esc10(folder):
    write_clips(folder, "001 - Dog bark/1-1-A.ogg", "002 - Rain/5-2-A.ogg")


def make_speech_commands(folder):
    write_csv(folder / "validation_list.txt", "yes/b_nohash_0.wav")
    write_csv(folder / "testing_list.txt", "no/c_nohash_1.wav")
    write_clips(folder, "yes/a_nohash_0.wav", "yes/b_nohash_0.wav", "no/c_nohash_1.wav",
                "_background_noise_/pink_nohash_0.wav")


def make_urbansound8k(folder):
    write_csv(folder / "metadata" / "UrbanSound8K.csv",
              "slice_file_name,fsID,start,end,salience,fold,classID,class",
              "1-3-0-0.wav,1,0,4,1,5,3,dog_bark", "2-1-0-0.wav,2,0,4,1,10,1,car_horn")
    write_clips(folder, "audio/fold5/1-3-0-0.wav", "audio/fold10/2-1-0-0.wav")


def make_fsd50k(folder):
    truth = folder / "FSD50K.ground_truth"
    write_csv(truth / "dev.csv", "fname,labels,mids,split", '1,"Acoustic_guitar,Music",m,train',
              "2,Rain,m,val")
    write_csv(truth / "eval.csv", "fname,labels,mids", "3,Bark,m")
    write_clips(folder, "FSD50K.dev_audio/1.wav", "FSD50K.dev_audio/2.wav",
                "FSD50K.eval_audio/3.wav")


def make_clotho(folder):
    for name in ("development", "validation", "evaluation"):
        write_csv(folder / f"clotho_captions_{name}.csv",
                  "file_name,caption_1,caption_2,caption_3,caption_4,caption_5",
                  f'{name}.wav,"Rain, then wind.",b,c,d,e')
        write_clips(folder, f"{name}/{name}.wav")


def make_audiocaps(folder):
    for n, split in enumerate(("train", "val", "test")):
        write_csv(folder / f"{split}.csv", "audiocap_id,youtube_id,start_time,caption",
                  f"{n},x{n},30,A dog barks")
        write_clips(folder, f"x{n}_30.wav")


def make_librispeech(folder):
    for subset in ("train-clean-5", "dev-clean-2"):
        chapter = folder / subset / "19" / "198"
        write_csv(chapter / "19-198.trans.txt", "19-198-0000 NORTHANGER ABBEY")
        write_clips(folder, f"{subset}/19/198/19-198-0000.flac")


# For each data set: how many questions of each split, and what some answer is
LAYOUTS = {
    "fsdd": (make_fsdd, {"train": 12, "test": 12}, ("seven", "bob")),
    "esc50": (make_esc50, {"train": 1, "test": 1}, ("chirping birds",)),
    "esc10": (make_esc10, {"train": 1, "test": 1}, ("dog bark", "rain")),
    "speech_commands": (make_speech_commands, {"train": 1, "val": 1, "test": 1}, ("yes", "no")),
    "urbansound8k": (make_urbansound8k, {"train": 1, "test": 1}, ("dog bark",)),
    "fsd50k": (make_fsd50k, {"train": 1, "val": 1, "test": 1}, ("acoustic guitar, music",)),
    "clotho": (make_clotho, {"train": 5, "val": 5, "test": 5}, ("Rain, then wind.", "e")),
    "audiocaps": (make_audiocaps, {"train": 1, "val": 1, "test": 1}, ("A dog barks",)),
    "librispeech": (make_librispeech, {"train": 1, "val": 1}, ("northanger abbey",))}


def run(capsys, *arguments):
    """(exit code, items printed, stderr) of a command."""
    capsys.readouterr()
    try:
        convert.main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as end:
        code = end.code
    stdout, stderr = capsys.readouterr()
    return code, [json.loads(line) for line in stdout.splitlines()], stderr


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_data_set_becomes_a_list_that_can_be_used(name, tmp_path, capsys):
    make, sizes, answers = LAYOUTS[name]
    make(tmp_path)
    code, items, _ = run(capsys, name, tmp_path)
    assert code == 0 and len(items) == sum(sizes.values())
    assert set(answers) <= {item["output"] for item in items}
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, items)))
    if name not in ("esc10", "librispeech"):  # whose files here are no real ogg and flac
        assert len(QuestionList(tmp_path / "list.jsonl")) == len(items)
    for split, size in sizes.items():
        part = run(capsys, name, tmp_path, "--split", split)[1]
        assert len(part) == size and all(item in items for item in part)


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_folder_is_one_line_that_says_what_was_expected(name, tmp_path, capsys):
    for folder, word in ((tmp_path, "expected"), (tmp_path / "none", "no such folder")):
        code, items, stderr = run(capsys, name, folder)
        assert code == 2 and not items and word in stderr and str(folder) in stderr
        assert stderr.count("\n") == 1


def test_folds_and_splits_that_are_not_there(tmp_path, capsys):
    make_esc50(tmp_path)
    assert run(capsys, "esc50", tmp_path, "--split", "test", "--fold", 1)[1][0]["output"] == "dog"
    code, _, stderr = run(capsys, "esc50", tmp_path, "--split", "val")
    assert code == 2 and "esc50 has test, train there" in stderr


def test_sequences_of_digits_are_written_with_their_lists(tmp_path, capsys, monkeypatch):
    make_fsdd(tmp_path)
    monkeypatch.setattr(convert, "SEQUENCES", {"test": 2, "train": 5})
    options = "fsdd", tmp_path, "--sequence", "3:4", "--out", tmp_path / "out"
    assert run(capsys, *options)[0] == 0
    lists = {split: list(QuestionList(tmp_path / "out" / f"{split}.jsonl"))
             for split in ("train", "test")}
    assert len(lists["test"]) == 4 and 0 < len(lists["train"]) <= 10
    tests = {item["output"] for item in lists["test"]}
    for item in lists["train"] + lists["test"]:
        words = item["output"].split()
        assert len(words) in (3, 4) and set(words) <= {"three", "seven"}
        seconds = len(load_audio(item["clip"], 8000)) / 8000
        low, high = convert.SEQUENCE_PAUSE
        assert seconds >= 0.1 * len(words) + low * (len(words) - 1) - 0.01
        assert seconds <= 0.1 * len(words) + high * (len(words) - 1) + 0.01
    assert not tests & {item["output"] for item in lists["train"]}
    first = (tmp_path / "out" / "train.jsonl").read_text()
    assert run(capsys, *options)[0] == 0 and (tmp_path / "out" / "train.jsonl").read_text() == first
    for wrong in ("3", "0:2", "4:3", "x:y"):
        assert run(capsys, "fsdd", tmp_path, "--sequence", wrong, "--out", "x")[0] == 2
    assert run(capsys, "fsdd", tmp_path, "--sequence", "3:4")[0] == 2
