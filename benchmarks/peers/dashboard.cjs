/**
 * The peer in Node: what the dashboard's server does with its keepers, for benchmarks. Node 18
 * or newer, no dependencies.
 *
 * `node dashboard.cjs scan <folder>` scans a sessions folder once, forgets dead keepers, ends
 * those whose agent is dead, says what it found in one line, and ends.
 *
 * `node dashboard.cjs write <folder> <sid>` answers each line on its standard input, a number
 * of writes, by {each, all}: the milliseconds of each write, and the seconds of all of them,
 * one after the other.
 *
 * It is written to be fast: synchronous calls where nothing else is to be done meanwhile, no
 * more system calls than the work needs. It does what that server does, by bare pids and names.
 */
"use strict";

const fs = require("node:fs");
const net = require("node:net");
const readline = require("node:readline");

const PID_FILE = ".rpc.sock.pid";
const ATTEMPTS = 3;
const ATTEMPT_MS = 350;
const PAUSES_MS = [50, 150];
const LINE = '{"type":"get_state","id":"1"}';

// -- Scan and clean ---------------------------------------------------------------------

function pidIn(file) {
  try {
    const pid = Number.parseInt(fs.readFileSync(file, "utf8"), 10);
    return pid > 0 ? pid : undefined;
  } catch {
    return undefined;
  }
}

function isAlive(pid) {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}

function unlinkQuietly(file) {
  try {
    fs.unlinkSync(file);
  } catch {
    // not there
  }
}

function scan(folder) {
  const found = { live: 0, forgotten: 0 };
  for (const name of fs.readdirSync(folder)) {
    if (!name.endsWith(PID_FILE)) continue;
    const pidFile = `${folder}/${name}`;
    const socket = pidFile.slice(0, -".pid".length);
    const keeper = pidIn(pidFile);
    const alive = keeper !== undefined && isAlive(keeper);
    const agent = alive ? pidIn(`${socket}.pi-pid`) : undefined;
    if (alive && (agent === undefined || isAlive(agent))) {
      found.live += 1;
      continue;
    }
    if (alive) process.kill(-keeper, "SIGTERM");
    unlinkQuietly(pidFile);
    unlinkQuietly(socket);
    found.forgotten += 1;
  }
  return found;
}

// -- Write ------------------------------------------------------------------------------

/** One attempt: it went well once the line is with the kernel. There is no receipt. */
function attempt(socketPath, line) {
  return new Promise((resolve) => {
    const client = net.createConnection(socketPath);
    const timer = setTimeout(() => {
      client.destroy();
      resolve(false);
    }, ATTEMPT_MS);
    const settle = (ok) => {
      clearTimeout(timer);
      resolve(ok);
    };
    client.once("connect", () => client.end(`${line}\n`, "utf8", () => settle(true)));
    client.once("error", () => settle(false));
  });
}

async function write(socketPath, line) {
  for (let number = 0; number < ATTEMPTS; number += 1) {
    if (number > 0) await new Promise((go) => setTimeout(go, PAUSES_MS[number - 1]));
    if (await attempt(socketPath, line)) return true;
  }
  return false;
}

async function writes(socketPath, count) {
  const each = [];
  const begun = performance.now();
  for (let number = 0; number < count; number += 1) {
    const start = performance.now();
    if (!(await write(socketPath, LINE))) throw new Error("a write has failed");
    each.push(performance.now() - start);
  }
  return { each, all: (performance.now() - begun) / 1000 };
}

const [what, folder, sid] = process.argv.slice(2);
if (what === "scan") {
  console.log(JSON.stringify(scan(folder)));
} else {
  const socketPath = `${folder}/${sid}.rpc.sock`;
  readline.createInterface({ input: process.stdin }).on("line", async (count) => {
    console.log(JSON.stringify(await writes(socketPath, Number(count))));
  });
  console.log("ready");
}
