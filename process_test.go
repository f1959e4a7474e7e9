package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestMain makes the test binary the product when SIDECAST_TEST_MAIN=1, so that tests run real processes of exactly
// the code under test, with its race detector and coverage and without a build of their own.
func TestMain(m *testing.M) {
	if os.Getenv("SIDECAST_TEST_MAIN") != "1" {
		flag.Set("test.parallel", "6") // unless the command line says otherwise: tests mostly wait
		os.Exit(m.Run())
	}
	go func() { // a test binary that panics or runs into -timeout cleans nothing up: follow it
		for parent := os.Getppid(); os.Getppid() == parent; {
			time.Sleep(time.Second)
		}
		os.Exit(1)
	}()
	main()
}

// A process is a gateway or a backend in a process of its own. Only the goroutine of its test may call its methods.
type process struct {
	URL     string // base URL, without a trailing slash
	command []string
	env     []string        // all of its environment
	probe   string          // the path that answers 200 once it is up
	limit   time.Duration   // how long it may take to be up
	out     *os.File        // stdout and stderr of all runs
	cmd     *exec.Cmd       // the latest run
	exited  context.Context // done once cmd has been waited for
}

// startGateway starts a gateway and waits until it is up. It runs SSE_GATEWAY_CMD if that is set, so that the same
// tests hold another implementation to the contract, or else our own. env is KEY=value; PORT is chosen if not given.
func startGateway(t testing.TB, env ...string) *process {
	t.Helper()
	if cmd := os.Getenv("SSE_GATEWAY_CMD"); cmd != "" {
		return gatewayProcess(t, env, "sh", "-c", "exec "+cmd).mustStart(t)
	}
	return startOwnGateway(t, env...)
}

// startOwnGateway is startGateway for what only our own gateway promises.
func startOwnGateway(t testing.TB, env ...string) *process {
	t.Helper()
	needsOwnGateway(t)
	return gatewayProcess(t, env, os.Args[0], "gateway").mustStart(t)
}

// needsOwnGateway skips a test of our own gateway when SSE_GATEWAY_CMD names another, so that such a run says which
// tests did not apply to it.
func needsOwnGateway(t testing.TB) {
	t.Helper()
	if os.Getenv("SSE_GATEWAY_CMD") != "" {
		t.Skip("this is about sidecast's own gateway, and SSE_GATEWAY_CMD is set")
	}
}

// startBackend starts the backend and waits until it is ready. ADDR is chosen if not given, and without SSE_GATEWAY_URL
// it has a gateway of its own.
func startBackend(t testing.TB, env ...string) *process {
	t.Helper()
	if envValue(env, "SSE_GATEWAY_URL") == "" {
		needsOwnGateway(t)
	}
	env = append([]string{fmt.Sprintf("ADDR=127.0.0.1:%d", freePort(t))}, env...)
	return newProcess(t, "http://"+envValue(env, "ADDR"), env, os.Args[0]).mustStart(t)
}

func gatewayProcess(t testing.TB, env []string, command ...string) *process {
	env = append([]string{fmt.Sprintf("PORT=%d", freePort(t))}, env...)
	p := newProcess(t, "http://127.0.0.1:"+envValue(env, "PORT"), env, command...)
	if envValue(env, "CALLBACK_URL") == "" {
		p.probe = "/healthz" // such a gateway never becomes ready, and there are tests of that
	}
	return p
}

// newProcess returns a process without starting it. It sees only what any program needs of our own environment, so no
// API_TOKEN or PORT of a developer decides how a test ends.
func newProcess(t testing.TB, url string, env []string, command ...string) *process {
	out, err := os.CreateTemp(t.TempDir(), "output")
	must(t, err)
	t.Cleanup(func() { out.Close() })
	p := &process{URL: url, command: command, probe: "/readyz", limit: 30 * time.Second, out: out}
	for _, key := range []string{"PATH", "HOME", "TMPDIR", "GOCOVERDIR"} {
		if value, ok := os.LookupEnv(key); ok {
			p.env = append(p.env, key+"="+value)
		}
	}
	p.env = append(p.env, "SIDECAST_TEST_MAIN=1", "GORACE=atexit_sleep_ms=0") // otherwise -race sleeps 1 s at each exit
	p.env = append(p.env, env...)
	return p
}

// mustStart starts the process and ties it to its test: it ends with the test, its output is logged if the test failed,
// and a data race in it fails the test.
func (p *process) mustStart(t testing.TB) *process {
	t.Helper()
	must(t, p.start())
	t.Cleanup(func() {
		p.stop(t)
		if strings.Contains(p.output(), "WARNING: DATA RACE") {
			t.Error("data race in a process of this test")
		}
		if t.Failed() {
			t.Logf("output of %q at %s:\n%s", p.command, p.URL, p.output())
		}
	})
	return p
}

// start runs the command and returns once it is up. If it exits instead, or is not up within p.limit, it is not left
// running, and the error has its output.
func (p *process) start() error {
	cmd := exec.Command(p.command[0], p.command[1:]...)
	cmd.Env, cmd.Stdout, cmd.Stderr = p.env, p.out, p.out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // so that signals reach what a wrapper script starts, too
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting %q: %w", p.command, err)
	}
	exited, exit := context.WithCancel(context.Background())
	p.cmd, p.exited = cmd, exited
	go func() {
		cmd.Wait()                                      // the result is in cmd.ProcessState
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // what is left of the group
		exit()
	}()
	deadline := time.After(p.limit)
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		if p.isUp() && exited.Err() == nil { // otherwise another process answered on that port
			return nil
		}
		select {
		case <-exited.Done():
			return fmt.Errorf("starting %q: exit code %d; output:\n%s", p.command, p.exitCode(), p.output())
		case <-deadline:
			p.signal(syscall.SIGKILL)
			<-exited.Done()
			return fmt.Errorf("starting %q: not up within %v; output:\n%s", p.command, p.limit, p.output())
		case <-time.After(pause):
		}
	}
}

// isUp probes once. It leaves no connection open, as the process should have only those of the test.
func (p *process) isUp() bool {
	client := http.Client{Timeout: min(time.Second, p.limit), Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get(p.URL + p.probe)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// stop asks the process to end (SIGTERM), kills it after the 5 s that the program promises, and returns the exit code,
// -1 if a signal ended it. If the process has ended before, stop just returns the exit code.
func (p *process) stop(t testing.TB) int {
	t.Helper()
	p.signal(syscall.SIGTERM)
	select {
	case <-p.exited.Done():
	case <-time.After(5 * time.Second):
		t.Logf("%q did not end within 5 s of SIGTERM", p.command)
		p.kill(t)
	}
	return p.exitCode()
}

// wantStop is stop for a process that must end in time and without an error.
func (p *process) wantStop(t testing.TB) {
	t.Helper()
	if got := p.stop(t); got != 0 {
		t.Errorf("%s: exit code %d, want 0 within 5 s", p.URL, got)
	}
}

// kill ends the process as a crash would, and returns when it is gone.
func (p *process) kill(testing.TB) {
	p.signal(syscall.SIGKILL)
	<-p.exited.Done()
}

// restart starts the process again with the same address and environment, after a kill if it still runs.
func (p *process) restart(t testing.TB) {
	t.Helper()
	p.kill(t)
	must(t, p.start())
}

// signal does nothing once the process has been waited for: its number may have been reused.
func (p *process) signal(sig syscall.Signal) {
	if p.exited.Err() == nil {
		syscall.Kill(-p.pid(), sig)
	}
}

func (p *process) pid() int      { return p.cmd.Process.Pid }
func (p *process) exitCode() int { return p.cmd.ProcessState.ExitCode() }

// output returns what all runs have written so far; any goroutine may ask.
func (p *process) output() string {
	text, _ := os.ReadFile(p.out.Name())
	return string(text)
}

// envValue returns the value of key; the last one counts, as it does for os/exec.
func envValue(env []string, key string) (value string) {
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, key+"="); ok {
			value = v
		}
	}
	return value
}

// portsGiven has the ports that freePort returned: tests run in parallel.
var portsGiven sync.Map

// freePort returns a TCP port without a listener. It is below the range from which Linux and macOS serve outgoing
// connections and ":0", so none of those takes it before the process binds it, or during a restart.
func freePort(t testing.TB) int {
	t.Helper()
	for range 100 {
		port := 20000 + rand.IntN(10000)
		if _, taken := portsGiven.LoadOrStore(port, true); taken {
			continue
		}
		if l, err := net.Listen("tcp", fmt.Sprintf(":%d", port)); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("no free port in 100 tries")
	return 0
}

// alone runs a test in a process of its own, because of what other tests leave on the heap. It reports whether this is
// that process.
func alone(t *testing.T) bool {
	t.Helper()
	t.Parallel()
	if os.Getenv("SIDECAST_ALONE") != "" {
		return true
	}
	cmd := exec.Command(os.Args[0], "-test.v", "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), "SIDECAST_ALONE=1")
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

// A testOutput is a log, or what a program prints, that can be read while it is written.
type testOutput struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *testOutput) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(line)
}

func (l *testOutput) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// serveTest starts an HTTP server that closes with its test.
func serveTest(t testing.TB, handler http.Handler) *httptest.Server {
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return server
}

// must ends the test if there is an error.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until cond, which what describes, holds. It fails the test if that takes longer than limit.
func eventually(t testing.TB, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for pause := 2 * time.Millisecond; !cond(); pause = min(2*pause, 50*time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(pause)
	}
}

// A process that does not start must fail its test soon and with its own output, or every cause looks like a timeout.
func TestGatewayStartupTimeoutFails(t *testing.T) {
	needs(t, "sh")
	t.Setenv("API_TOKEN", "the developer's")
	for _, tt := range []struct {
		name, script string
		limit        time.Duration
		want         string
	}{
		{"never ready", "echo starting; sleep 60", time.Second, "not up within 1s; output:\nstarting\n"},
		{"exits at once", "echo bad option >&2; exit 3", time.Minute, "exit code 3; output:\nbad option\n"},
		{"clean environment", `echo "[$API_TOKEN$OWN]"`, time.Minute, "exit code 0; output:\n[own]\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := gatewayProcess(t, []string{"OWN=own"}, "sh", "-c", tt.script)
			p.limit = tt.limit
			began := time.Now()
			err := p.start()
			if err == nil || !strings.HasSuffix(err.Error(), tt.want) {
				t.Errorf("got error %v, want one that ends in %q", err, tt.want)
			}
			if took := time.Since(began); took > 10*time.Second || p.exited.Err() == nil {
				t.Errorf("start took %v, and the process has exited: %v", took, p.exited.Err() != nil)
			}
		})
	}
}
