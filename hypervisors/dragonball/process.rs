//! The process around Dragonball, which is a library: protocol 1 of docs/dragonball.md, in one file.
//!
//! What: serves a unix socket, one JSON line for each action, in Dragonball's own names; passes it to the VMM's
//! thread and its outcome back. Nothing of the library is in here.
//! Why a source and no program: who runs Dragonball builds it with his own copy of the library, for his hosts.
//! Invariants: a line has at most LIMIT bytes; one client at a time, and the VM outlives it; an action is answered
//! once, by its id; what has no answer yet when the VM ends gets an error; the exit event is the last line.
//! Crates: dragonball (features hotplug, dbs-upcall, virtio-{vsock,blk,net,fs,mem,balloon}, vhost-net,
//! vhost-user-{fs,net,blk}, host-device), crossbeam-channel, libc, log, serde, serde_json, slog, slog-scope,
//! vmm-sys-util.
//! Tried with the library of Kata 4.1.0, Rust 1.95.

use std::collections::HashMap;
use std::error::Error;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use crossbeam_channel::{unbounded, Receiver, Sender};
use dragonball::api::v1::*;
use dragonball::device_manager::vfio_dev_mgr::HostDeviceConfig;
use dragonball::vcpu::VcpuResizeInfo;
use dragonball::vm::{CpuTopology, VmConfigInfo};
use dragonball::Vmm;
use serde::de::DeserializeOwned;
use serde::Deserialize;
use serde_json::{json, Value};
use vmm_sys_util::eventfd::EventFd;

const PROTOCOL: u32 = 1;
const LIMIT: usize = 64 << 10; // bytes of a line, its end included
const GUEST: Duration = Duration::from_secs(60); // for the guest's answer to a plug
const CLIENT: Duration = Duration::from_secs(5); // for a client to take what is written
const PANICKED: i32 = 101;

static CLIENT_NOW: Mutex<Option<UnixStream>> = Mutex::new(None);
static WHY: Mutex<&str> = Mutex::new("reset");

/// One line to the client; without one, or if it takes nothing, it is lost.
fn say(value: &Value) {
    let mut client = CLIENT_NOW.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let Some(stream) = client.as_mut() else { return };
    if stream.write_all(format!("{value}\n").as_bytes()).is_err() {
        let _ = stream.shutdown(Shutdown::Both); // it is not heard any more, either
        *client = None;
    }
}

/// The library's VmConfigInfo has no form of its own in JSON.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Machine {
    vcpu_count: u8,
    max_vcpu_count: u8,
    cpu_pm: String,
    cpu_topology: CpuTopology,
    vpmu_feature: u8,
    mem_type: String,
    mem_file_path: String,
    mem_size_mib: usize,
    serial_path: Option<String>,
    pci_hotplug_enabled: bool,
}

impl Default for Machine {
    fn default() -> Self {
        let own = VmConfigInfo::default();
        Machine {
            vcpu_count: own.vcpu_count,
            max_vcpu_count: own.max_vcpu_count,
            cpu_pm: own.cpu_pm,
            cpu_topology: own.cpu_topology,
            vpmu_feature: own.vpmu_feature,
            mem_type: own.mem_type,
            mem_file_path: own.mem_file_path,
            mem_size_mib: own.mem_size_mib,
            serial_path: own.serial_path,
            pci_hotplug_enabled: own.pci_hotplug_enabled,
        }
    }
}

impl From<Machine> for VmConfigInfo {
    fn from(told: Machine) -> Self {
        VmConfigInfo {
            vcpu_count: told.vcpu_count,
            max_vcpu_count: told.max_vcpu_count,
            cpu_pm: told.cpu_pm,
            cpu_topology: told.cpu_topology,
            vpmu_feature: told.vpmu_feature,
            mem_type: told.mem_type,
            mem_file_path: told.mem_file_path,
            mem_size_mib: told.mem_size_mib,
            serial_path: told.serial_path,
            pci_hotplug_enabled: told.pci_hotplug_enabled,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vcpus {
    vcpu_count: Option<u8>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Files {
    state_path: String,
    mem_path: String,
}

fn fault(kind: &str, causes: Vec<String>) -> Value {
    json!({"kind": kind, "causes": causes})
}

fn body<T: DeserializeOwned>(told: Value) -> Result<T, Value> {
    serde_json::from_value(told).map_err(|error| fault("InvalidBody", vec![error.to_string()]))
}

/// An action by its name in VmmAction, with the fields of its variant.
fn action(name: &str, told: Value) -> Result<VmmAction, Value> {
    Ok(match name {
        "SetVmConfiguration" => VmmAction::SetVmConfiguration(body::<Machine>(told)?.into()),
        "GetVmConfiguration" => VmmAction::GetVmConfiguration,
        "GetHypervisorMetrics" => VmmAction::GetHypervisorMetrics,
        "ConfigureBootSource" => VmmAction::ConfigureBootSource(body(told)?),
        "StartMicroVm" => VmmAction::StartMicroVm,
        "StartMicroVmFromSnapshot" => {
            let Files { state_path, mem_path } = body(told)?;
            VmmAction::StartMicroVmFromSnapshot { state_path, mem_path }
        }
        "ShutdownMicroVm" => VmmAction::ShutdownMicroVm,
        "PauseMicroVm" => VmmAction::PauseMicroVm,
        "ResumeMicroVm" => VmmAction::ResumeMicroVm,
        "SaveMicrovm" => {
            let Files { state_path, mem_path } = body(told)?;
            VmmAction::SaveMicrovm { state_path, mem_path }
        }
        "InsertVsockDevice" => VmmAction::InsertVsockDevice(body(told)?),
        "InsertBlockDevice" => VmmAction::InsertBlockDevice(body(told)?),
        "PrepareRemoveBlockDevice" => VmmAction::PrepareRemoveBlockDevice(body(told)?),
        "RemoveBlockDevice" => VmmAction::RemoveBlockDevice(body(told)?),
        "UpdateBlockDevice" => VmmAction::UpdateBlockDevice(body(told)?),
        "InsertNetworkDevice" => VmmAction::InsertNetworkDevice(body(told)?),
        "UpdateNetworkInterface" => VmmAction::UpdateNetworkInterface(body(told)?),
        "InsertFsDevice" => VmmAction::InsertFsDevice(body(told)?),
        "ManipulateFsBackendFs" => VmmAction::ManipulateFsBackendFs(body(told)?),
        "UpdateFsDevice" => VmmAction::UpdateFsDevice(body(told)?),
        "ResizeVcpu" => {
            let Vcpus { vcpu_count } = body(told)?;
            VmmAction::ResizeVcpu(VcpuResizeInfo { vcpu_count })
        }
        "InsertMemDevice" => VmmAction::InsertMemDevice(body(told)?),
        "InsertBalloonDevice" => VmmAction::InsertBalloonDevice(body(told)?),
        "InsertHostDevice" => VmmAction::InsertHostDevice(body::<HostDeviceConfig>(told)?),
        "PrepareRemoveHostDevice" => VmmAction::PrepareRemoveHostDevice(body(told)?),
        "RemoveHostDevice" => VmmAction::RemoveHostDevice(body(told)?),
        _ => return Err(fault("UnknownAction", vec![format!("there is no action {name:?}")])),
    })
}

/// The name of the error's variant, and what it says, the outermost first.
fn refusal(error: &VmmActionError) -> Value {
    let shown = format!("{error:?}");
    let kind = shown.split(|letter: char| !letter.is_alphanumeric()).next().unwrap_or_default();
    let (mut causes, mut next) = (vec![error.to_string()], error.source());
    while let Some(cause) = next {
        let text = cause.to_string();
        if !causes.last().is_some_and(|last| last.contains(&text)) {
            causes.push(text);
        }
        next = cause.source();
    }
    fault(kind, causes)
}

fn machine(config: &VmConfigInfo) -> Value {
    json!({
        "vcpu_count": config.vcpu_count,
        "max_vcpu_count": config.max_vcpu_count,
        "cpu_pm": config.cpu_pm,
        "cpu_topology": config.cpu_topology,
        "vpmu_feature": config.vpmu_feature,
        "mem_type": config.mem_type,
        "mem_file_path": config.mem_file_path,
        "mem_size_mib": config.mem_size_mib,
        "serial_path": config.serial_path,
        "pci_hotplug_enabled": config.pci_hotplug_enabled,
    })
}

/// The VMM's thread, as its clients see it. `turn`: one action is under way.
#[derive(Clone)]
struct Vm {
    to: Sender<VmmRequest>,
    from: Receiver<VmmResponse>,
    wake: Arc<EventFd>,
    turn: Arc<Mutex<()>>,
    info: Arc<RwLock<InstanceInfo>>,
    vmm: Arc<Mutex<Vmm>>,
}

impl Vm {
    fn ask(&self, action: VmmAction) -> Result<VmmData, Value> {
        let gone = || fault("VmNotExist", vec!["the VM has ended".to_string()]);
        self.to.send(Box::new(action)).map_err(|_| gone())?;
        self.wake.write(1).map_err(|_| gone())?;
        self.from.recv().map_err(|_| gone())?.map_err(|error| refusal(&error))
    }

    fn instance(&self) -> Value {
        let upcall = self.vmm.lock().unwrap().get_vm().is_some_and(|vm| vm.is_upcall_client_ready());
        let info = self.info.read().unwrap();
        json!({"state": format!("{:?}", info.state), "pid": info.pid, "tids": info.tids, "upcall": upcall})
    }

    /// Do what one line says, and answer it; what the guest has to do first is waited for elsewhere.
    fn serve(&self, line: &[u8]) {
        let _turn = self.turn.lock().unwrap();
        let mut told: Value = match serde_json::from_slice(line) {
            Ok(Value::Object(told)) => Value::Object(told),
            _ => return say(&json!({"id": null, "error": fault("InvalidJson", vec!["no object".to_string()])})),
        };
        let id = told["id"].take();
        let (name, fields) = match told["action"].take() {
            Value::String(name) => (name, Value::Null),
            Value::Object(one) if one.len() == 1 => one.into_iter().next().unwrap(),
            _ => (String::new(), Value::Null),
        };
        if name == "GetInstanceInfo" {
            return say(&json!({"id": id, "ok": self.instance()}));
        }
        if name == "ShutdownMicroVm" {
            *WHY.lock().unwrap() = "shutdown";
        }
        let outcome = match action(&name, fields).and_then(|action| self.ask(action)) {
            Ok(VmmData::SyncHotplug((sender, answers))) => {
                std::thread::spawn(move || {
                    let outcome = match answers.recv_timeout(GUEST) {
                        Ok(result) => json!({"id": id, "ok": {"result": result}}),
                        Err(RecvTimeoutError::Timeout) => {
                            let why = format!("the guest did not answer within {} s", GUEST.as_secs());
                            json!({"id": id, "error": fault("GuestTimeout", vec![why])})
                        }
                        Err(RecvTimeoutError::Disconnected) => {
                            json!({"id": id, "error": fault("GuestGone", vec!["no answer will come".to_string()])})
                        }
                    };
                    drop(sender);
                    say(&outcome);
                });
                return;
            }
            Ok(VmmData::Empty) => Ok(Value::Null),
            Ok(VmmData::MachineConfiguration(config)) => Ok(machine(&config)),
            Ok(VmmData::HypervisorMetrics(text)) => Ok(Value::String(text)),
            Ok(VmmData::VfioDeviceData(slot)) => Ok(json!({"slot": slot})),
            Err(error) => Err(error),
        };
        say(&match outcome {
            Ok(data) => json!({"id": id, "ok": data}),
            Err(error) => json!({"id": id, "error": error}),
        });
    }

    /// One client after another.
    fn listen(&self, listener: UnixListener) {
        for stream in listener.incoming().flatten() {
            let Ok(writer) = stream.try_clone() else { continue };
            let _ = writer.set_write_timeout(Some(CLIENT));
            *CLIENT_NOW.lock().unwrap() = Some(writer);
            let version = self.info.read().unwrap().vmm_version.clone();
            say(&json!({"event": "hello", "protocol": PROTOCOL, "dragonball": version, "pid": std::process::id()}));
            let mut lines = BufReader::new(stream);
            loop {
                let mut line = Vec::new();
                match lines.by_ref().take(LIMIT as u64).read_until(b'\n', &mut line) {
                    Ok(count) if count > 0 && line.ends_with(b"\n") => self.serve(&line),
                    Ok(LIMIT) => {
                        let why = vec![format!("more than {LIMIT} bytes")];
                        say(&json!({"id": null, "error": fault("LineTooLong", why)}));
                        break;
                    }
                    _ => break,
                }
            }
            *CLIENT_NOW.lock().unwrap() = None;
        }
    }
}

/// The library's words, on stderr: it writes by two crates.
struct Words;

impl log::Log for Words {
    fn enabled(&self, metadata: &log::Metadata) -> bool {
        metadata.level() <= log::max_level()
    }
    fn log(&self, record: &log::Record) {
        if self.enabled(record.metadata()) {
            eprintln!("{} {}: {}", record.level(), record.target(), record.args());
        }
    }
    fn flush(&self) {}
}

impl slog::Drain for Words {
    type Ok = ();
    type Err = slog::Never;
    fn log(&self, record: &slog::Record, _: &slog::OwnedKVList) -> Result<(), slog::Never> {
        if record.level().as_usize() <= log::max_level() as usize + 1 {
            eprintln!("{} {}: {}", record.level().as_str(), record.module(), record.msg());
        }
        Ok(())
    }
}

fn die(text: String) -> ! {
    eprintln!("dragonball: {text}");
    std::process::exit(1)
}

/// `--api fd=N` (a listening socket that is inherited) or `--api PATH`; `--log LEVEL`.
fn arguments() -> (UnixListener, String) {
    let (mut listener, mut path, mut level) = (None, String::new(), log::LevelFilter::Warn);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match (word.as_str(), words.next()) {
            ("--api", Some(place)) => match place.strip_prefix("fd=").map(str::parse) {
                // SAFETY: the number is the caller's, who says that it is a listening socket for us.
                Some(Ok(number)) => listener = Some(unsafe { UnixListener::from_raw_fd(number) }),
                Some(Err(_)) => die(format!("--api {place}: no number")),
                None => {
                    listener = Some(UnixListener::bind(&place).unwrap_or_else(|error| die(format!("{place}: {error}"))));
                    path = place;
                }
            },
            ("--log", Some(name)) => level = name.parse().unwrap_or_else(|_| die(format!("no log level {name}"))),
            _ => die(format!("usage: --api fd=N|PATH [--log LEVEL]; not {word}")),
        }
    }
    log::set_max_level(level);
    (listener.unwrap_or_else(|| die("--api is needed".to_string())), path)
}

fn main() {
    let (listener, path) = arguments();
    let _ = log::set_logger(&Words);
    let _logger = slog_scope::set_global_logger(slog::Logger::root(Words, slog::o!()));
    // SIGTERM and SIGINT come to one thread only, and end the VM in good order.
    let mut wanted: libc::sigset_t = unsafe { std::mem::zeroed() };
    unsafe {
        libc::sigemptyset(&mut wanted);
        libc::sigaddset(&mut wanted, libc::SIGTERM);
        libc::sigaddset(&mut wanted, libc::SIGINT);
        libc::pthread_sigmask(libc::SIG_BLOCK, &wanted, std::ptr::null_mut());
    }
    std::panic::set_hook(Box::new(|panic| {
        let text = format!("{panic}").chars().take(1000).collect::<String>();
        eprintln!("dragonball: {text}");
        if let Ok(mut client) = CLIENT_NOW.try_lock() {
            let line = json!({"event": "panic", "message": text});
            let _ = client.as_mut().map(|stream| stream.write_all(format!("{line}\n").as_bytes()));
        }
        unsafe { libc::_exit(PANICKED) }
    }));

    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let kvm = kvm.unwrap_or_else(|error| die(format!("/dev/kvm: {error}")));
    let wake = EventFd::new(libc::EFD_NONBLOCK).unwrap_or_else(|error| die(format!("eventfd: {error}")));
    let info = Arc::new(RwLock::new(InstanceInfo::default()));
    let copy = wake.try_clone().unwrap_or_else(|error| die(format!("eventfd: {error}")));
    let vmm = Vmm::new(info.clone(), copy, HashMap::new(), Some(kvm.into_raw_fd()));
    let vmm = Arc::new(Mutex::new(vmm.unwrap_or_else(|error| die(format!("no VM can be made: {error:?}")))));
    // SAFETY: gettid has no failure.
    info.write().unwrap().master_tid = unsafe { libc::gettid() } as u32;

    let (to, requests) = unbounded();
    let (answers, from) = unbounded();
    let turn = Arc::new(Mutex::new(()));
    let vm = Vm { to, from, wake: Arc::new(wake), turn: turn.clone(), info, vmm: vmm.clone() };
    let ending = vm.clone();
    std::thread::spawn(move || {
        let mut number = 0;
        unsafe { libc::sigwait(&wanted, &mut number) };
        let _turn = ending.turn.lock();
        *WHY.lock().unwrap() = "signal";
        let _ = ending.ask(VmmAction::ShutdownMicroVm);
    });
    std::thread::spawn(move || vm.listen(listener));

    let code = Vmm::run_vmm_event_loop(vmm, VmmService::new(requests, answers));
    let _turn = turn.lock(); // an answer under way comes first
    let why = if code == 0 { *WHY.lock().unwrap() } else { "failure" };
    say(&json!({"event": "exit", "code": code, "reason": why}));
    if !path.is_empty() {
        let _ = std::fs::remove_file(path);
    }
    std::process::exit(code)
}
