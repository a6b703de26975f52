"""The configuration promises: Kata's files mean the same here, and no mistake in one goes unsaid."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devices.errors import ConfigError
from hypervisors.config import HypervisorConfig
from shim.config import ConfigFileError, load_config
from shim.config import find as find_module
from shim.config.find import find_config
from shim.sandbox.cold_devices import with_agent_params

if TYPE_CHECKING:
    from tests.unit.shim.config.conftest import Files

MINIMAL = '[runtime]\nhypervisor_name = "qemu"\n[hypervisor.qemu]\n'


def problems(files: Files, text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigFileError) as caught:
        files.load(text)
    assert caught.value.phase == "config"
    return tuple(line.replace(str(files.base), "FILE") for line in caught.value.problems)


# --- values


def test_an_empty_file_gives_the_defaults(files: Files) -> None:
    config = files.load("")
    assert config.hypervisor_name == "qemu"
    assert config.runtime.hypervisor_name == "qemu"
    assert config.agent.name == config.runtime.agent_name == "kata"
    assert config.runtime.log_level == "info"
    assert config.agent.server_port == 1024
    assert config.agent.boot_deadline == 10.0
    assert config.agent.request_deadline == 30.0
    assert config.inactive == ()
    assert config.path == str(files.base)


def test_each_kind_of_value_arrives(files: Files) -> None:
    section = files.load(
        "[hypervisor.qemu]\n"
        'default_vcpus = 2\ndefault_memory = 256\nenable_debug = true\nvirtio_fs_extra_args = ["-d", "x"]\n'
        'shared_fs = "none"\n'
    ).hypervisor
    assert (section.default_vcpus, type(section.default_vcpus)) == (2.0, float)
    assert section.default_memory == 256
    assert section.enable_debug is True
    assert section.virtio_fs_extra_args == ("-d", "x")
    assert section.shared_fs == "none"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("default_vcpus = true", "must be a number, not true"),
        ('default_memory = "256"', 'must be an integer, not "256"'),
        ("default_memory = 2.5", "must be an integer, not 2.5"),
        ("default_memory = true", "must be an integer, not true"),
        ("enable_debug = 1", "must be true or false, not 1"),
        ("kernel = 7", "must be a string, not 7"),
        ('virtio_fs_extra_args = "-d"', 'must be an array of strings, not "-d"'),
        ("virtio_fs_extra_args = [1]", "must be an array of strings, not [1]"),
        ("enable_iothreads = 1", "must be true or false, not 1"),
        ("overhead_vcpus = false", "must be a number, not false"),
        ('factory = "x"', 'must be a table, not "x"'),
        ("guest_extension_images = [1]", "must be an array of tables, not [1]"),
    ],
)
def test_a_wrong_type_is_told_with_its_line(files: Files, line: str, what: str) -> None:
    key = line.split(maxsplit=1)[0]
    assert problems(files, f"\n[hypervisor.qemu]\n# a comment\n{line}\n") == (
        f"FILE:4: [hypervisor.qemu] {key} {what}",
    )


def test_unknown_keys_are_told_all_with_line_nearest_name_and_type(files: Files) -> None:
    text = (
        "[runtime]\nenabel_debug = true\n[hypervisor.qemu]\nkernal = 'x'\ndefault_memry = 1\n"
        "[agent.kata]\nzzz = 1\n[runtim]\n[factory]\nenable_templat = true\n"
    )
    assert problems(files, text) == (
        'FILE:8: there is no section "runtim"; the nearest is "runtime" (a table)',
        'FILE:2: [runtime] has no key "enabel_debug"; the nearest is "enable_debug" (true or false)',
        'FILE:7: [agent.kata] has no key "zzz"; no known key is like it',
        'FILE:10: [factory] has no key "enable_templat"; the nearest is "enable_template" (true or false)',
        'FILE:4: [hypervisor.qemu] has no key "kernal"; the nearest is "kernel" (a string)',
        'FILE:5: [hypervisor.qemu] has no key "default_memry"; the nearest is "default_memory" (an integer)',
    )


def test_the_error_is_one_paragraph_with_the_first_problem_and_a_hint(files: Files) -> None:
    with pytest.raises(ConfigError) as caught:
        files.load("[runtime]\nx = 1\ny = 2\n")
    text = str(caught.value)
    assert text.startswith(f'config: {files.base}:2: [runtime] has no key "x"; no known key is like it')
    assert text.endswith(f"(and 1 more: `kata-ctl config check {files.base}`); try: correct the file")
    assert "\n" not in text


def test_only_the_chosen_hypervisor_and_agent_are_looked_at(files: Files) -> None:
    config = files.load(
        '[runtime]\nhypervisor_name = "b"\nagent_name = "mine"\n[hypervisor.a]\nnonsense = 1\n'
        "[hypervisor.b]\ndefault_memory = 1\n[agent.other]\nnonsense = 2\n[agent.mine]\nserver_port = 5\n"
    )
    assert files.asked == ["b"]
    assert config.hypervisor_name == "b"
    assert (config.agent.name, config.agent.server_port) == ("mine", 5)


def test_the_only_section_counts_where_runtime_names_none(files: Files) -> None:
    """Files of Kata's Go runtime have no hypervisor_name."""
    assert files.load("[hypervisor.clh]\n[agent.x]\n").hypervisor_name == "clh"
    assert files.load("[hypervisor.clh]\n[hypervisor.fc]\n").hypervisor_name == "qemu"


def test_a_key_without_effect_is_listed_with_its_line(files: Files) -> None:
    config = files.load(
        '[runtime]\njaeger_password = "geheim"\n[hypervisor.qemu]\nenable_iothreads = true\n'
        "queue_size = 128\ndisable_guest_selinux = false\npflashes = []\n"
        "[agent.kata.mem_agent]\nmem_agent_enable = true\n"
    )
    by_key = {each.key: each for each in config.inactive}
    assert sorted(by_key) == [
        "disable_guest_selinux",
        "enable_iothreads",
        "jaeger_password",
        "mem_agent_enable",
        "pflashes",
        "queue_size",
    ]
    assert str(by_key["enable_iothreads"]) == (
        f"{files.base}:4: [hypervisor.qemu] enable_iothreads = true has no effect yet: "
        "kata-shim behaves as with false"
    )
    assert by_key["mem_agent_enable"].locate() == (str(files.base), 9)
    assert by_key["mem_agent_enable"].section == "agent.kata.mem_agent"
    assert "geheim" not in str(by_key["jaeger_password"])
    assert sorted(key for key, each in by_key.items() if each.harmless) == [
        "pflashes",
        "queue_size",
    ]


def test_a_field_of_the_plugin_is_never_without_effect(files: Files) -> None:
    """seccomp_sandbox is in the table of keys without effect, but this plugin has it."""
    config = files.load('[hypervisor.qemu]\nseccompsandbox = "on"\n')
    assert config.hypervisor.seccomp_sandbox == "on"
    assert config.inactive == ()


def test_an_alias_beside_its_key_is_an_error(files: Files) -> None:
    assert problems(files, '[hypervisor.qemu]\nseccompsandbox = "on"\nseccomp_sandbox = "on"\n') == (
        "FILE:2: [hypervisor.qemu] seccompsandbox is seccomp_sandbox once more; keep one",
    )


def test_sections_must_be_tables(files: Files) -> None:
    with pytest.raises(ConfigError, match=r"configuration.toml:1: hypervisor must be a table"):
        files.load("hypervisor = 1\n")
    with pytest.raises(ConfigError, match=r"configuration.toml:2: hypervisor.qemu must be a table"):
        files.load("[hypervisor]\nqemu = 1\n")


# --- rules between keys


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('[runtime]\nname = "wasm"', 'FILE:2: [runtime] name must be "virt_container", not "wasm"'),
        ("[agent.kata]\nserver_port = 0", "server_port must be a vsock port (1 to 4294967295), not 0"),
        ("[agent.kata]\nserver_port = 4294967296", "server_port must be a vsock port (1 to 4294967295)"),
        ("[agent.kata]\ndial_timeout_ms = 0", "dial_timeout_ms must be above 0, not 0"),
        (
            "[agent.kata]\ndial_timeout_ms = 50\nreconnect_timeout_ms = 40",
            "FILE:3: [agent.kata] reconnect_timeout_ms must be at least dial_timeout_ms (50), not 40",
        ),
        ("[agent.kata]\ncreate_container_timeout = 0", "must be above 0 (seconds), not 0.0"),
        ("[agent.kata]\nkill_timeout = 0.5", "kill_timeout must be from 1 to 300 (seconds), not 0.5"),
        ("[agent.kata]\nkill_timeout = nan", "kill_timeout must be from 1 to 300 (seconds), not nan"),
        ("[agent.kata]\nhealth_check_interval = 0.1", "must be 0, or from 1 to 86400 (seconds), not 0.1"),
        ("[agent.kata]\nhealth_check_request_timeout_ms = 0", "must be above 0 and at most 600000, not 0"),
        ('[agent.kata]\nhealth_check_action = "stop"', "must be one of none, end, not stop"),
        ('[runtime]\non_shim_death = "stay"', 'on_shim_death must be one of end, keep, not "stay"'),
    ],
)
def test_values_out_of_range(files: Files, text: str, what: str) -> None:
    (problem,) = problems(files, text + "\n")
    assert what in problem


def test_an_unknown_log_level(files: Files) -> None:
    (problem,) = problems(files, '[runtime]\nlog_level = "loud"\n')
    assert problem.startswith("FILE:2: [runtime] log_level must be one of trace, debug, info, ")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('internetworking_model = "l3forwarding"', '"l3forwarding" is not supported; there are tcfilter,'),
        ('internetworking_model = "bridge"', '"bridge" is no model; there are tcfilter, macvtap, none'),
        ("disable_new_netns = true", 'needs internetworking_model = "none"'),
    ],
)
def test_models_of_the_network_that_there_are_not(files: Files, text: str, what: str) -> None:
    (problem,) = problems(files, f"[runtime]\n{text}\n")
    assert problem.startswith("FILE:2: [runtime] ")
    assert what in problem


def test_models_of_the_network(files: Files) -> None:
    """As in Kata, "" means tcfilter, and a pod without a network of its own needs none."""
    for model in ("", "tcfilter", "macvtap", "none"):
        config = files.load(f'[runtime]\ninternetworking_model = "{model}"\n')
        assert config.runtime.internetworking_model == model
    text = '[runtime]\ninternetworking_model = "none"\ndisable_new_netns = true\n'
    assert files.load(text).runtime.disable_new_netns


def test_the_boot_deadline_is_never_below_ten_seconds(files: Files) -> None:
    assert files.load("[agent.kata]\nreconnect_timeout_ms = 3000\n").agent.boot_deadline == 10.0
    assert files.load("[agent.kata]\nreconnect_timeout_ms = 60000\n").agent.boot_deadline == 60.0


def test_katas_firecracker_file_with_a_long_dial_timeout_loads(files: Files) -> None:
    agent = files.load("[agent.kata]\ndial_timeout_ms = 45000\n").agent
    assert agent.reconnect_timeout_ms == 45000


def test_keys_of_katas_go_runtime_arrive_in_their_fields(files: Files) -> None:
    agent = files.load("[agent.kata]\ndial_timeout = 45\n[runtime]\ncreate_container_timeout = 60\n").agent
    assert agent.reconnect_timeout_ms == 45000
    assert agent.create_container_timeout == 60.0


def test_what_is_done_about_a_guest_that_does_not_answer(files: Files) -> None:
    """Told within ten seconds of a kill, and within two minutes of a silence; nothing ends by itself."""
    agent = files.load("").agent
    assert (agent.kill_timeout, agent.health_check_interval, agent.health_check_action) == (
        10.0,
        30.0,
        "none",
    )
    katas = files.load("[agent.kata]\nhealth_check_request_timeout_ms = 90000\n")
    assert (katas.agent.health_check_request_timeout_ms, katas.inactive) == (90_000, ())


def test_the_agents_own_section_wins_over_the_runtimes(files: Files) -> None:
    agent = files.load(
        "[runtime]\ncreate_container_timeout = 60\n[agent.kata]\ncreate_container_timeout = 5\n"
    ).agent
    assert agent.create_container_timeout == 5.0


def test_a_stock_image_is_told_where_its_root_is_and_what_to_start(files: Files) -> None:
    """By the words that Kata's shims have for it; the administrator's come after them, and win."""
    image = files.directory / "kata.img"
    image.write_bytes(bytes(4096))
    section = HypervisorConfig(kernel_params="root=/dev/mine")

    def words(text: str) -> list[str]:
        config = dataclasses.replace(files.load(text), hypervisor=section)
        return list(with_agent_params(config, 0).kernel_params.split())

    stock = f'[hypervisor.qemu]\nimage = "{image}"\n'
    plain = words(stock)
    assert "systemd.unit=kata-containers.target" in plain
    assert not any(word.startswith("root=/dev/vda") for word in plain)
    table = bytearray(4096)
    table[450], table[510:512] = 0x83, b"\x55\xaa"  # the first partition's type, the table's mark
    image.write_bytes(table)
    told = words(stock)
    assert told.index("root=/dev/vda1") < told.index("root=/dev/mine")
    ours = words(stock + "[agent.kata]\nhome_call = true\n")
    assert not any(word.startswith(("systemd.", "root=/dev/vda")) for word in ours)


def test_our_guest_calls_home_and_takes_streams_and_a_stock_one_does_not(
    files: Files, make_file: Callable[[str], str]
) -> None:
    image, initrd = f'image = "{make_file("image")}"\n', f'initrd = "{make_file("initrd")}"\n'
    ours = files.load("[hypervisor.qemu]\n" + image + initrd)
    assert (ours.agent.home_call, ours.runtime.use_passfd_io) == (True, True)
    stock = files.load("[hypervisor.qemu]\n" + image)
    assert (stock.agent.home_call, stock.runtime.use_passfd_io) == (False, False)
    told = files.load("[agent.kata]\nhome_call = true\n")
    assert (told.agent.home_call, told.runtime.use_passfd_io) == (True, True)
    off = files.load("[runtime]\nuse_passfd_io = false\n[agent.kata]\nhome_call = true\n")
    assert (off.agent.home_call, off.runtime.use_passfd_io) == (True, False)


def test_streams_that_a_stock_guest_cannot_take_are_off_and_said_to_be(files: Files) -> None:
    config = files.load("[runtime]\nuse_passfd_io = true\n")
    assert config.runtime.use_passfd_io is False
    (note,) = config.inactive
    assert str(note).startswith(f"{files.base}:2: [runtime] use_passfd_io = true has no effect")
    assert not note.harmless
    assert files.load("[runtime]\nuse_passfd_io = false\n").inactive == ()


# --- paths


def test_files_that_are_named_must_be_there(files: Files, make_file: Callable[[str], str]) -> None:
    plain = Path(make_file("plain"))
    plain.chmod(0o644)
    text = (
        f'[hypervisor.qemu]\nkernel = "/no/kernel"\ninitrd = "relative"\nimage = "{files.directory}"\n'
        f'path = "{plain}"\n'
    )
    assert problems(files, text) == (
        f"FILE:5: [hypervisor.qemu] path = '{plain}' is not executable",
        "FILE:2: [hypervisor.qemu] kernel = '/no/kernel' does not exist",
        "FILE:3: [hypervisor.qemu] initrd = 'relative' must be an absolute path",
        f"FILE:4: [hypervisor.qemu] image = '{files.directory}' is not a regular file",
    )


def test_what_everybody_may_write_does_not_run_as_root(files: Files, make_file: Callable[[str], str]) -> None:
    kernel = Path(make_file("vmlinux"))
    kernel.chmod(0o646)
    assert problems(files, f'[hypervisor.qemu]\nkernel = "{kernel}"\n') == (
        f"FILE:2: [hypervisor.qemu] kernel = '{kernel}' may be written by everybody (try: chmod o-w)",
    )


def test_a_kernel_that_is_not_there_comes_with_a_hint_how_to_get_one(files: Files) -> None:
    with pytest.raises(ConfigError) as caught:
        files.load('[hypervisor.qemu]\nkernel = "/no/kernel"\n')
    assert str(caught.value).startswith(f"config: {files.base}:2: [hypervisor.qemu] kernel = '/no/kernel' ")
    assert "make guest" in caught.value.hint


def test_a_daemon_that_is_not_used_need_not_exist(files: Files) -> None:
    daemon = 'virtio_fs_daemon = "/no/virtiofsd"\n'
    files.load(f'[hypervisor.qemu]\nshared_fs = "none"\n{daemon}')
    (problem,) = problems(files, f"[hypervisor.qemu]\n{daemon}")
    assert problem.endswith("virtio_fs_daemon = '/no/virtiofsd' does not exist")


# --- the plugin


def test_the_plugin_adjusts_then_validates(files: Files) -> None:
    config = files.load(MINIMAL)
    assert config.hypervisor.default_memory == 128
    assert files.plugin.validated == [config.hypervisor]


def test_what_the_plugin_refuses_is_a_config_error_that_names_the_file(files: Files) -> None:
    with pytest.raises(ConfigError, match="13 MiB bring bad luck") as caught:
        files.load("[hypervisor.qemu]\ndefault_memory = 13\n")
    assert (caught.value.phase, caught.value.hint) == ("config", f"correct {files.base}")


# --- files


def test_drop_ins_are_laid_over_in_the_order_of_their_names(files: Files) -> None:
    files.write(
        '[runtime]\nlog_level = "info"\n[hypervisor.qemu]\ndefault_memory = 1\nenable_debug = true\n'
        'virtio_fs_extra_args = ["a", "b"]\n'
    )
    files.write("[hypervisor.qemu]\ndefault_memory = 2\n", "config.d/10-first.toml")
    last = files.write(
        '[hypervisor.qemu]\n\ndefault_memory = 3\nvirtio_fs_extra_args = ["c"]\n', "config.d/20-last.toml"
    )
    files.write("not TOML", "config.d/30-copy.toml~")
    files.write("not TOML", "config.d/.40-hidden.toml")
    config = files.load()
    assert config.hypervisor.default_memory == 3
    assert config.hypervisor.enable_debug is True
    assert config.hypervisor.virtio_fs_extra_args == ("c",)
    assert [os.path.basename(file) for file in config.files] == [
        "configuration.toml",
        "10-first.toml",
        "20-last.toml",
    ]
    last.write_text("[hypervisor.qemu]\n\ndefault_memory = 'x'\n")
    (problem,) = problems(files, files.base.read_text())
    assert problem.startswith(f"{last}:3: [hypervisor.qemu] default_memory must be an integer")


def test_drop_ins_lie_beside_the_file_that_a_link_leads_to(files: Files) -> None:
    real = files.write("[hypervisor.qemu]\ndefault_memory = 1\n", "real/configuration-qemu.toml")
    files.write("[hypervisor.qemu]\ndefault_memory = 2\n", "real/config.d/a.toml")
    files.write("[hypervisor.qemu]\ndefault_memory = 99\n", "config.d/wrong-place.toml")
    files.base.symlink_to(real)
    config = files.load()
    assert config.hypervisor.default_memory == 2
    assert config.path == str(files.base)


def test_a_file_that_is_not_toml_is_told_with_line_and_column(files: Files) -> None:
    with pytest.raises(ConfigError, match=r"configuration.toml:2: not TOML: .* \(column 8\)") as caught:
        files.load("[runtime]\nname = \n")
    assert caught.value.phase == "config"


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: path.mkdir(), "not a regular file|Is a directory"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.write_bytes(b"\xff"), "not UTF-8"),
        (lambda path: path.write_bytes(b"#" * ((1 << 20) + 1)), "larger than 1048576 bytes"),
    ],
)
def test_what_is_no_text_file_is_refused(files: Files, make: Callable[[Path], None], what: str) -> None:
    make(files.base)
    with pytest.raises(ConfigError, match=what):
        files.load()


@pytest.mark.parametrize("drop_in", [False, True])
def test_a_file_that_somebody_else_may_write_is_refused(files: Files, drop_in: bool) -> None:
    """The base file and each drop-in: who writes it has any program run as root."""
    files.load("[runtime]\n")
    path = files.base
    if drop_in:
        path = files.directory / "config.d" / "10-mine.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text("[runtime]\n")
    path.chmod(0o646)
    with pytest.raises(ConfigError, match=f"{path}: everybody may write it") as caught:
        files.load()
    assert caught.value.hint == f"chmod o-w {path}"

    path.chmod(0o664)
    if os.geteuid() == 0:
        os.chown(path, 4711, 0)
        with pytest.raises(ConfigError, match=f"{path}: it belongs to user 4711") as caught:
            files.load()
        assert caught.value.hint == f"chown root {path}"
        os.chown(path, 0, 0)
    files.load()


# --- where the file is looked for


def test_the_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {}
    for name in ("given", "options", "environment", "etc", "share"):
        path = tmp_path / name
        path.write_text("")
        names[name] = str(path)
    monkeypatch.setattr(find_module, "SEARCH_PATH", (names["etc"], names["share"]))
    env = {"KATA_CONF_FILE": names["environment"]}
    assert find_config(names["given"], options_path=names["options"], env=env) == names["given"]
    assert find_config(None, options_path=names["options"], env=env) == names["options"]
    assert find_config("", options_path="", env=env) == names["environment"]
    assert find_config(None, env={"KATA_CONF_FILE": ""}) == names["etc"]
    os.unlink(names["etc"])
    assert find_config(None) == names["share"]
    os.unlink(names["share"])
    with pytest.raises(ConfigError, match="there is no configuration file; looked for ") as caught:
        find_config(None)
    assert "make install" in caught.value.hint


def test_a_runtime_class_has_a_file_of_its_own_and_takes_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """io.containerd.kata-fc.v2 reads configuration-fc.toml; `fc` must never run as something else."""
    plain, env_file = tmp_path / "etc/configuration.toml", tmp_path / "env/my.toml"
    for path in (plain, env_file):
        path.parent.mkdir()
        path.write_text("")
    monkeypatch.setattr(find_module, "SEARCH_PATH", (str(plain),))
    with pytest.raises(ConfigError, match="no configuration file for the runtime class") as caught:
        find_config(None, runtime_class="fc")
    assert str(tmp_path / "etc/configuration-fc.toml") in caught.value.cause
    env = {"KATA_CONF_FILE": str(env_file)}
    with pytest.raises(ConfigError, match="no configuration file for the runtime class"):
        find_config(None, runtime_class="fc", env=env)
    ours = tmp_path / "etc/configuration-fc.toml"
    ours.write_text("")
    assert find_config(None, runtime_class="fc") == str(ours)
    beside = tmp_path / "env/configuration-fc.toml"
    beside.write_text("")
    assert find_config(None, runtime_class="fc", env=env) == str(beside)
    assert find_config(None, runtime_class="fc", options_path=str(plain), env=env) == str(plain)


@pytest.mark.parametrize(("path", "what"), [("x.toml", "absolute path"), ("/no/such.toml", "does not exist")])
def test_a_file_that_was_named_must_be_there(path: str, what: str) -> None:
    with pytest.raises(ConfigError, match=f"Options.config_path.*{what}"):
        load_config(None, options_path=path)
    with pytest.raises(ConfigError, match=f"KATA_CONF_FILE.*{what}"):
        load_config(None, env={"KATA_CONF_FILE": path})


# --- the cost


def test_reading_imports_neither_tomlkit_nor_what_only_messages_need() -> None:
    script = (
        "import sys, shim.config, shim.config.load\n"
        "print([m for m in ('tomlkit', 'difflib', 'typing_extensions', 'importlib.metadata', "
        "'shim.config.position', 'asyncio', 'pydantic') if m in sys.modules])"
    )
    root = Path(__file__).parents[4]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n", re.sub(r"\s+", " ", done.stderr)
