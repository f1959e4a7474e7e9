package main

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// These tests run the commands in README.md and the files in examples, with only addresses, secrets and pauses changed.

// readme returns what is in README.md between two lines, edited as oldNew says.
func readme(t testing.TB, after, before string, oldNew ...string) string {
	t.Helper()
	_, text, found := strings.Cut(edited(t, "README.md", oldNew...), after+"\n")
	text, _, ended := strings.Cut(text, before+"\n")
	if !found || !ended {
		t.Fatalf("README.md has nothing between %q and %q", after, before)
	}
	return text
}

// A worker needs no library of ours, in any language.
func TestWorkers(t *testing.T) {
	t.Parallel()
	backend := startBackend(t, "API_TOKEN="+deployToken)
	dir := t.TempDir()
	writeFile(t, dir+"/worker.sh", readme(t, "```sh", "```", "api=localhost:8080", "api="+backend.URL, "sleep 1", "sleep 0.01"))
	writeFile(t, dir+"/worker.py", edited(t, "examples/worker.py", "sleep(1)", "sleep(0.01)"))
	writeFile(t, dir+"/worker.mjs", edited(t, "examples/worker.mjs", "sleep(1000)", "sleep(10)"))
	for _, worker := range [][]string{{"sh", "worker.sh", "curl"}, {"python3", "worker.py"}, {"node", "worker.mjs"}} {
		t.Run(worker[0], func(t *testing.T) {
			if _, err := exec.LookPath(worker[0]); err != nil && worker[0] != "sh" {
				t.Skipf("there is no %s, and .ci/run installs none", worker[0])
			}
			needs(t, append(worker[2:], worker[0])...)
			cmd := exec.Command(worker[0], filepath.Join(dir, worker[1]))
			cmd.Env = append(os.Environ(), "API="+backend.URL, "API_TOKEN="+deployToken)
			out, err := cmd.CombinedOutput()
			path := regexp.MustCompile(`/api/sse/tasks\?task_id=[0-9a-f-]{36}`).FindString(string(out))
			if err != nil || path == "" {
				t.Fatalf("%v, want a stream_url with a UUID:\n%s", err, out)
			}
			es := openEventSource(t, backend.URL+path)
			waitTold(t, es, "1 task_started", "2 progress_update 2 of 10 files", "3 progress_update 4 of 10 files", "4 progress_update 6 of 10 files",
				"5 progress_update 8 of 10 files", "6 task_completed", "connection_close task_completed")
			if data := es.events()[5].Data; !strings.Contains(data, `"text":"8 of 10 files","value":0.8`) {
				t.Errorf("got %s", data)
			}
		})
	}
}

// The commands for production in README.md leave nothing open: everything is on loopback, and what is not for browsers
// is on a port of its own.
func TestProductionCommands(t *testing.T) {
	t.Parallel()
	commands := readme(t, "production, behind a proxy on the same machine:\n", "\nThe proxy sends `/api/sse/` to port 3000 and the rest to port 8080. Nobody else")
	for _, port := range []string{"8080", "3000", "3001"} {
		if !strings.Contains(commands, ":"+port) && !strings.Contains(commands, "PORT="+port) {
			t.Fatalf("README.md: no port %s in %s", port, commands)
		}
		commands = regexp.MustCompile(`\b`+port+`\b`).ReplaceAllString(commands, fmt.Sprint(freePort(t)))
	}
	var env [2][]string // of the gateway, and of the backend
	for i, command := range strings.SplitAfterN(commands, "sidecast gateway\n", 2) {
		for _, m := range regexp.MustCompile(`\b([A-Z_]+)='?([^\s']+)`).FindAllStringSubmatch(command, -1) {
			value := strings.ReplaceAll(m[2], "…", deploySecret)
			if m[1] == "API_TOKEN" {
				value = deployToken
			}
			env[i] = append(env[i], m[1]+"="+value)
		}
	}
	gateway := newProcess(t, "http://127.0.0.1:"+envValue(env[0], "PORT"), env[0], os.Args[0], "gateway").mustStart(t)
	backend := newProcess(t, "http://"+envValue(env[1], "ADDR"), env[1], os.Args[0]).mustStart(t)

	waitTold(t, openEventSource(t, gateway.URL+startTask(t, backend.URL, "", oneDemo)), "1 task_started", "2 progress_update step 1 of 1", "3 task_completed", "connection_close task_completed")
	for _, path := range []string{"/internal/send", "/internal/reset", "/metrics"} {
		if status, _ := ask(t, "POST", gateway.URL+path, "{}"); status != http.StatusNotFound {
			t.Errorf("%s on the gateway's public port: got %d, want 404", path, status)
		}
	}
	for _, p := range []*process{gateway, backend} {
		for _, addr := range listening(t, p.pid()) {
			if addr != "0100007F" {
				t.Errorf("%q listens on %s, want only 127.0.0.1", p.command, addr)
			}
		}
	}
}

// listening returns the addresses that a process listens on, in the notation of proc(5).
func listening(t testing.TB, pid int) (addrs []string) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d/", pid)
	fds, err := os.ReadDir(proc + "fd")
	if err != nil {
		t.Skip("this test needs /proc")
	}
	sockets := map[string]bool{}
	for _, fd := range fds {
		target, _ := os.Readlink(proc + "fd/" + fd.Name())
		sockets[target] = true
	}
	for _, table := range []string{"net/tcp", "net/tcp6"} {
		text, _ := os.ReadFile(proc + table)
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line) // number, local address, remote address, state, …, inode
			if len(f) > 9 && f[3] == "0A" && sockets["socket:["+f[9]+"]"] {
				addr, _, _ := strings.Cut(f[1], ":")
				addrs = append(addrs, addr)
			}
		}
	}
	if len(addrs) == 0 {
		t.Errorf("process %d listens nowhere", pid)
	}
	return addrs
}

// Every test that SECURITY.md names exists.
func TestSecurityNamesItsTests(t *testing.T) {
	files, err := filepath.Glob("*_test.go")
	must(t, err)
	var code strings.Builder
	for _, file := range files {
		code.WriteString(edited(t, file))
	}
	_, table, _ := strings.Cut(edited(t, "SECURITY.md"), "\n## What is refused\n")
	names := regexp.MustCompile("`(Test\\w+)`").FindAllStringSubmatch(table, -1)
	for _, m := range names {
		if !strings.Contains(code.String(), "\nfunc "+m[1]+"(") {
			t.Errorf("SECURITY.md: there is no %s", m[1])
		}
	}
	if len(names) < 20 {
		t.Errorf("SECURITY.md names %d tests", len(names))
	}
}
