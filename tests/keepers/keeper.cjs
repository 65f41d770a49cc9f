/**
 * The other keeper: a stand-in for the dashboard's Node keeper, for tests and as the peer
 * of benchmarks. `node keeper.cjs <sid>`; Node 18 or newer, no dependencies.
 *
 * It keeps to the contract that keepers and their clients share: names, environment,
 * order, exit codes, wire. And it keeps the habits of that keeper which a reconciler has to
 * live with, each marked `Habit`. Nothing here is made slower or worse than it has to be.
 */
"use strict";

const { spawn } = require("node:child_process");
const fs = require("node:fs");
const net = require("node:net");
const os = require("node:os");
const path = require("node:path");

const EXIT_ENDED = 0;
const EXIT_AGENT_FAILED = 1;
const EXIT_FATAL = 2;
const READY_AFTER_MS = 300;
const DEFAULT_LOG_MAX_BYTES = 128 * 1024 * 1024;
const DEFAULT_LOG_CHECK_INTERVAL_MS = 5000;
const LF = 0x0a;

const sid = process.argv[2];
if (!sid) {
  console.error("usage: keeper.cjs <session id>");
  process.exit(EXIT_FATAL);
}

const windows = process.platform === "win32";
const home = process.env.PI_DASHBOARD_HOME;
const base = home && home.trim() ? home : os.homedir();
const sessionsDir = path.join(base, ".pi", "dashboard", "sessions");
// Habit: the session id goes into paths unchecked.
const socketPath = windows ? `\\\\.\\pipe\\pi-rpc-${sid}` : path.join(sessionsDir, `${sid}.rpc.sock`);
const fileStem = windows ? path.join(sessionsDir, `pi-rpc-${sid}`) : socketPath;
const pidPath = `${fileStem}.pid`;
const agentPidPath = `${fileStem}.pi-pid`;
const logPath = path.join(sessionsDir, `keeper-${sid}.log`);

let logFd;
try {
  fs.mkdirSync(sessionsDir, { recursive: true });
  logFd = fs.openSync(logPath, "a");
} catch (error) {
  console.error(`keeper ${sid}: cannot open its log: ${error.message}`);
  process.exit(EXIT_FATAL);
}

function log(text) {
  try {
    fs.writeSync(logFd, `${new Date().toISOString()} ${text}\n`);
  } catch {
    // A full disk must not end a session.
  }
}

function fatal(text) {
  log(`fatal: ${text}`);
  process.exit(EXIT_FATAL);
}

// -- What the environment asks for ------------------------------------------------------

function listFrom(name, fallback) {
  const text = process.env[name];
  if (text === undefined || text === "") return fallback;
  try {
    const list = JSON.parse(text);
    if (Array.isArray(list) && list.every((item) => typeof item === "string")) return list;
  } catch {
    // told below
  }
  log(`${name} is no JSON list of strings, the default is used`);
  return fallback;
}

function countFrom(name, fallback) {
  const count = Number.parseInt(process.env[name] ?? "", 10);
  return Number.isFinite(count) && count > 0 ? count : fallback;
}

const agentArguments = listFrom("PI_KEEPER_PI_ARGS", ["--mode", "rpc"]);
const configured = listFrom("PI_KEEPER_PI_CMD", ["pi"]);
const agentCommand = configured.length > 0 ? configured : ["pi"];
const capture = process.env.PI_KEEPER_CAPTURE_PI_OUTPUT === "1";
const logMaxBytes = countFrom("PI_KEEPER_LOG_MAX_BYTES", DEFAULT_LOG_MAX_BYTES);
const logCheckMs = countFrom("PI_KEEPER_LOG_CHECK_INTERVAL_MS", DEFAULT_LOG_CHECK_INTERVAL_MS);

function agentEnvironment() {
  const environment = { ...process.env, PI_DASHBOARD_SPAWNED: "1" };
  for (const name of Object.keys(environment)) {
    if (name.startsWith("PI_KEEPER_")) delete environment[name];
  }
  return environment; // with the spawn token: this is the first launch, and the only one
}

// -- Ending -----------------------------------------------------------------------------

let agent;
let ending = false;

function unlinkQuietly(file) {
  try {
    fs.unlinkSync(file);
  } catch {
    // not there
  }
}

/** Habit: the files go without a look at whose they are by now. */
function end(code, why) {
  if (ending) return;
  ending = true;
  log(`keeper ends: ${why}`);
  if (!windows) unlinkQuietly(socketPath);
  unlinkQuietly(pidPath);
  unlinkQuietly(agentPidPath);
  if (agent && agent.exitCode === null && agent.signalCode === null) agent.kill("SIGKILL");
  process.exit(code);
}

process.on("SIGTERM", () => end(EXIT_ENDED, "SIGTERM"));
process.on("SIGINT", () => end(EXIT_ENDED, "SIGINT"));

// -- The wire ---------------------------------------------------------------------------

/** Habit: what the agent does not read is kept in this process, without a bound. */
function toAgent(piece) {
  if (agent && agent.stdin.writable) agent.stdin.write(piece);
}

/**
 * Forward whole lines, verbatim. Sockets are not half-open: Node answers the client's
 * half-close with its own once everything before it was read and handed on here.
 */
function serve(client) {
  let pieces = [];
  client.on("data", (chunk) => {
    const cut = chunk.lastIndexOf(LF) + 1;
    if (cut === 0) {
      pieces.push(chunk);
      return;
    }
    toAgent(pieces.length > 0 ? Buffer.concat([...pieces, chunk.subarray(0, cut)]) : chunk.subarray(0, cut));
    pieces = cut < chunk.length ? [chunk.subarray(cut)] : [];
  });
  client.on("end", () => {
    // Habit: a client that went away in the middle of a line makes half a line a line.
    if (pieces.length > 0) toAgent(Buffer.concat([...pieces, Buffer.from([LF])]));
    pieces = [];
  });
  client.on("error", (error) => log(`client: ${error.message}`));
}

// -- Starting ---------------------------------------------------------------------------

function startAgent() {
  const startedAt = process.hrtime.bigint();
  const lived = () => Number(process.hrtime.bigint() - startedAt) / 1e6;
  const output = capture ? logFd : "ignore";
  agent = spawn(agentCommand[0], [...agentCommand.slice(1), ...agentArguments], {
    env: agentEnvironment(),
    stdio: ["pipe", output, output],
    windowsHide: true,
  });
  agent.on("error", (error) => end(EXIT_AGENT_FAILED, `agent cannot be started: ${error.message}`));
  agent.on("exit", (code, signal) => {
    end(lived() < READY_AFTER_MS ? EXIT_AGENT_FAILED : EXIT_ENDED, `agent exited (${signal ?? code})`);
  });
  agent.stdin.on("error", (error) => log(`agent stdin: ${error.message}`));
  if (agent.pid !== undefined) {
    try {
      fs.writeFileSync(agentPidPath, String(agent.pid));
    } catch (error) {
      log(`agent pid file: ${error.message}`);
    }
  }
  setTimeout(() => log(`keeper ready: ${sid}`), READY_AFTER_MS).unref();
}

function capLog() {
  try {
    if (fs.fstatSync(logFd).size > logMaxBytes) fs.ftruncateSync(logFd, 0);
  } catch (error) {
    log(`log cap: ${error.message}`);
  }
}

const server = net.createServer(serve);
server.on("error", (error) => fatal(`listen: ${error.message}`));

// Habit: whatever holds the name is unlinked, a live keeper's socket too.
if (!windows) unlinkQuietly(socketPath);
server.listen(socketPath, () => {
  try {
    // Habit: for a moment the socket has the mode of the umask.
    if (!windows) fs.chmodSync(socketPath, 0o600);
    // Habit: made empty in place, then filled.
    fs.writeFileSync(pidPath, String(process.pid));
  } catch (error) {
    fatal(`pid file: ${error.message}`);
  }
  startAgent();
  setInterval(capLog, logCheckMs).unref();
});
