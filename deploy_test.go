package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// These tests use the Dockerfile and the files in deploy, with only addresses, paths, intervals and limits changed.

// needs skips the test if a command is missing or, for "root", root privileges are. If CI is set it fails the test, as
// a skipped test proves nothing.
func needs(t testing.TB, tools ...string) {
	t.Helper()
	const text = "this test needs %s; run it as root, with the tools that .ci/run installs"
	for _, tool := range tools {
		_, err := exec.LookPath(tool)
		has := err == nil || tool == "root" && os.Geteuid() == 0
		switch {
		case has:
		case os.Getenv("CI") != "":
			t.Fatalf(text, tool)
		default:
			t.Skipf(text, tool)
		}
	}
}

// edited returns the text of a file, with each old string, which must occur, replaced by the new one that follows it.
func edited(t testing.TB, file string, oldNew ...string) string {
	t.Helper()
	content, err := os.ReadFile(file)
	must(t, err)
	text := string(content)
	for pair := range slices.Chunk(oldNew, 2) {
		if !strings.Contains(text, pair[0]) {
			t.Fatalf("%s has no %q", file, pair[0])
		}
		text = strings.ReplaceAll(text, pair[0], pair[1])
	}
	return text
}

func writeFile(t testing.TB, file, text string) {
	t.Helper()
	must(t, os.WriteFile(file, []byte(text), 0o644))
}

// tool runs a command to completion and returns its output. The command must succeed.
func tool(t testing.TB, stdin, name string, args ...string) (out string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	printed, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, printed)
	}
	return string(printed)
}

const (
	deployToken  = "api-token-of-a-test"
	deploySecret = "callback-secret-of-a-test"

	// The bodies that start the external task "t" and a short demo.
	oneExternal = `{"type":"external","params":{"task_id":"t"}}`
	oneDemo     = `{"type":"demo","params":{"steps":1}}`
)

// ask makes a request as a page of the same site would, with the API token, and returns the answer's status and body.
func ask(t testing.TB, method, target, body string) (status int, answer string) {
	t.Helper()
	req, err := http.NewRequest(method, target, strings.NewReader(body))
	must(t, err)
	req.Header.Set("Authorization", "Bearer "+deployToken)
	req.Header.Set("Origin", req.URL.Scheme+"://"+req.URL.Host)
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	client := http.Client{Timeout: soon}
	resp, err := client.Do(req)
	must(t, err)
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	must(t, err)
	return resp.StatusCode, string(content)
}

// mustAsk is like ask, but the request must succeed.
func mustAsk(t testing.TB, method, target, body string) (answer string) {
	t.Helper()
	status, answer := ask(t, method, target, body)
	if status/100 != 2 {
		t.Fatalf("%s %s: got %d %s", method, target, status, answer)
	}
	return answer
}

// startTask starts a task at the site base and returns the path of its stream. An ingress may route by the query.
func startTask(t testing.TB, base, query, body string) (streamPath string) {
	t.Helper()
	var answer struct {
		StreamURL string `json:"stream_url"`
	}
	must(t, json.Unmarshal([]byte(mustAsk(t, "POST", base+"/api/tasks"+query, body)), &answer))
	return answer.StreamURL
}

// told returns the story of a page's stream with the number of each event, as in "1 task_started".
func told(events []message) (all []string) {
	for _, m := range events {
		for _, said := range story([]message{m}) { // nothing of connection_open
			_, n, _ := strings.Cut(m.ID, "-")
			all = append(all, strings.TrimSpace(n+" "+said))
		}
	}
	return all
}

// waitTold waits until a page was told as much as want has, and checks that it is want; see told. After
// connection_close it waits until the stream has ended for good.
func waitTold(t testing.TB, es *eventSource, want ...string) {
	t.Helper()
	es.waitFor(t, soon, func(got []message) bool { return len(told(got)) >= len(want) })
	if strings.HasPrefix(want[len(want)-1], "connection_close") {
		if got := es.waitClosed(t, soon); got != http.StatusGone {
			t.Errorf("a finished stream ended with %d, want 410", got)
		}
	}
	if got := told(es.events()); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// The container

// An image is the final stage of the Dockerfile, laid out in a folder. It runs under chroot(8), without any engine.
type image struct {
	root                    string // the folder
	user                    string // uid:gid
	env                     []string
	entrypoint, healthcheck []string
	volumes                 []string
}

// buildImage interprets our Dockerfile, and knows only the instructions that it uses. It runs go build on this machine,
// and takes the CA roots from it.
func buildImage(t testing.TB) (img image) {
	build, final, _ := strings.Cut(edited(t, "Dockerfile"), "\nFROM scratch\n")
	stage := t.TempDir()
	command := regexp.MustCompile(`\nRUN (.* go build .*)`).FindStringSubmatch(build)
	if command == nil {
		t.Fatal("Dockerfile: no go build")
	}
	tool(t, "", "sh", "-c", strings.NewReplacer("-o /", "-o "+stage+"/", "mkdir /", "mkdir "+stage+"/").Replace(command[1]))

	img.root = t.TempDir()
	for line := range strings.Lines(final) {
		instruction, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		fields := strings.Fields(rest)
		_, array, _ := strings.Cut(rest, "[") // the exec form, which needs no shell
		switch instruction {
		case "", "#", "EXPOSE":
		case "COPY": // --from=build [--chown=UID:GID] SOURCE DESTINATION
			source, destination := fields[len(fields)-2], img.root+fields[len(fields)-1]
			if _, err := os.Stat(stage + source); err == nil {
				source = stage + source
			}
			tool(t, "", "mkdir", "-p", filepath.Dir(destination))
			tool(t, "", "cp", "-r", source, destination)
			if owner, ok := strings.CutPrefix(fields[1], "--chown="); ok {
				tool(t, "", "chown", owner, destination)
			}
		case "VOLUME": // the image's folder serves as the volume: an engine gives a new volume the owner of that folder
			json.Unmarshal([]byte("["+array), &img.volumes)
		case "USER":
			img.user = rest
		case "ENV":
			img.env = fields
		case "HEALTHCHECK":
			json.Unmarshal([]byte("["+array), &img.healthcheck)
		case "ENTRYPOINT":
			json.Unmarshal([]byte("["+array), &img.entrypoint)
		default:
			t.Fatalf("Dockerfile: this test does not know %q", line)
		}
	}
	return img
}

// inside is the command line that runs a command of the image.
func (img image) inside(command []string, args ...string) []string {
	return slices.Concat([]string{"chroot", "--userspec=" + img.user, "--groups=", img.root}, command, args)
}

// start runs the image as a container that listens on port.
func (img image) start(t testing.TB, port int, env []string, args ...string) *process {
	t.Helper()
	url := fmt.Sprintf("http://127.0.0.1:%d", port)
	return newProcess(t, url, slices.Concat(img.env, env), img.inside(img.entrypoint, args...)...).mustStart(t)
}

// healthy runs the health check in the container of p.
func (img image) healthy(p *process) bool {
	command := img.inside(img.healthcheck)
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Env = p.env
	return cmd.Run() == nil
}

// The image has only what the Dockerfile copies: no libc, so only a static binary runs, no shell, no /etc/hosts.
func TestContainer(t *testing.T) {
	needs(t, "root", "go", "sh", "chroot")
	t.Parallel()
	img := buildImage(t)
	gatewayPort, backendPort := freePort(t), freePort(t)
	gateway := img.start(t, gatewayPort, []string{
		"ADDR=",
		fmt.Sprintf("PORT=%d", gatewayPort),
		fmt.Sprintf("CALLBACK_URL=http://localhost:%d/api/sse/callback?secret=%s", backendPort, deploySecret),
	}, "gateway")
	backend := img.start(t, backendPort, []string{
		fmt.Sprintf("ADDR=localhost:%d", backendPort),
		fmt.Sprintf("SSE_GATEWAY_URL=http://localhost:%d", gatewayPort),
		"SSE_CALLBACK_SECRET=" + deploySecret,
		"API_TOKEN=" + deployToken,
	})

	es := openEventSource(t, gateway.URL+startTask(t, backend.URL, "", oneDemo), retryScale(0.05))
	waitTold(t, es, "1 task_started", "2 progress_update step 1 of 1", "3 task_completed", "connection_close task_completed")

	// The journal is in the volume, where the next container finds it.
	if data := envValue(img.env, "DATA_DIR"); !slices.Equal(img.volumes, []string{data}) {
		t.Errorf("the volumes are %q, and DATA_DIR is %q", img.volumes, data)
	}
	es = openEventSource(t, gateway.URL+startTask(t, backend.URL, "", oneExternal), retryScale(0.05))
	waitTold(t, es, "1 task_started")
	backend.kill(t)
	backend.restart(t)
	mustAsk(t, "POST", backend.URL+"/api/tasks/t/complete", `{"result":null}`)
	waitTold(t, es, "1 task_started", "2 task_completed", "connection_close task_completed")

	for _, p := range []*process{gateway, backend} {
		if !img.healthy(p) {
			t.Errorf("%s: not healthy", p.URL)
		}
		info, err := os.Stat(fmt.Sprintf("/proc/%d", p.pid()))
		must(t, err)
		owner := info.Sys().(*syscall.Stat_t)
		if got := fmt.Sprintf("%d:%d", owner.Uid, owner.Gid); got != img.user || owner.Uid == 0 {
			t.Errorf("%s: runs as %s, want %s, which must not be root", p.URL, got, img.user)
		}
		p.wantStop(t)
		if img.healthy(p) {
			t.Errorf("%s: healthy after its end", p.URL)
		}
	}
}

// nginx

// A host is a machine with a backend and its gateway.
type host struct{ backend, gateway *process }

// startHost starts a host, with env for both processes.
func startHost(t testing.TB, env ...string) host {
	t.Helper()
	return startHostBehind(t, startOwnGateway, env...)
}

// startHostBehind is startHost with a gateway that start starts.
func startHostBehind(t testing.TB, start func(testing.TB, ...string) *process, env ...string) host {
	t.Helper()
	addr := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	gateway := start(t, append(env, "CALLBACK_URL=http://"+addr+"/api/sse/callback?secret="+deploySecret)...)
	backend := startBackend(t, append([]string{"API_TOKEN=" + deployToken, "SSE_CALLBACK_SECRET=" + deploySecret,
		"SSE_GATEWAY_URL=" + gateway.URL, "ADDR=" + addr}, env...)...)
	return host{backend, gateway}
}

// address is where a process listens: host:port.
func address(p *process) string { return strings.TrimPrefix(p.URL, "http://") }

// front starts the nginx of a host, with its configuration edited to reach the host, and as oldNew says.
func (h host) front(t testing.TB, oldNew ...string) *process {
	t.Helper()
	return startNginx(t, "deploy/nginx.conf", append(oldNew,
		"server 127.0.0.1:8080", "server "+address(h.backend), "server 127.0.0.1:3000", "server "+address(h.gateway))...)
}

// startNginx starts nginx with one of our configurations, edited as oldNew says. It needs root, because Debian's nginx
// has its temporary folders in /var/lib.
func startNginx(t testing.TB, file string, oldNew ...string) *process {
	t.Helper()
	dir, addr := t.TempDir(), fmt.Sprintf("127.0.0.1:%d", freePort(t))
	conf := filepath.Join(dir, "nginx.conf")
	writeFile(t, conf, edited(t, file, append(oldNew,
		"listen 80;", "listen "+addr+";", "http {", "http {\naccess_log off;")...))
	return newProcess(t, "http://"+addr, nil,
		"nginx", "-e", "stderr", "-c", conf, "-g", "daemon off; pid "+dir+"/pid;").mustStart(t)
}

// wantHidden checks that a proxy answers 404 for every path that is not for browsers, however the path is spelled.
func wantHidden(t *testing.T, site string) {
	t.Helper()
	for _, request := range []string{
		"POST /internal/send", "POST /internal/reset", "POST /internal%2Fsend", "POST /%69nternal/send",
		"POST /x/../internal/send", "GET /api/sse/..%2f../internal/send",
		"GET /metrics", "GET //metrics", "GET /%6Detrics", "GET /metrics?x", "GET /api/sse/../../metrics",
		"POST /api/sse/callback", "POST /api/sse//callback?secret=" + deploySecret, "POST /api/sse/callback?secret=" + deploySecret,
		"POST /api/sse/callbac%6b",
	} {
		method, target, _ := strings.Cut(request, " ")
		if got, answer := ask(t, method, site+target, ""); got != http.StatusNotFound {
			t.Errorf("%s: got %d %.200s, want 404", request, got, answer)
		}
	}
}

func TestNginx(t *testing.T) {
	needs(t, "nginx", "root")
	t.Parallel()
	host := startHost(t)

	// Kubernetes adds a port that serves only metrics.
	metrics := regexp.MustCompile(`metrics\.conf: \|\n((?:    .*\n)+)`).FindStringSubmatch(edited(t, "deploy/kubernetes.yaml",
		"listen 9100;", fmt.Sprintf("listen 127.0.0.1:%d;", freePort(t)),
		"127.0.0.1:8080/", address(host.backend)+"/", "127.0.0.1:3001/", address(host.gateway)+"/"))
	extra := t.TempDir()
	writeFile(t, extra+"/metrics.conf", metrics[1])
	nginx := host.front(t, "/etc/sidecast/conf.d/", extra+"/")
	site := nginx.URL
	port := "http://" + regexp.MustCompile(`listen (.*);`).FindStringSubmatch(metrics[1])[1]
	for path, family := range map[string]string{"/backend": "task_executions_total", "/gateway": "gateway_streams"} {
		if page := mustAsk(t, "GET", port+path, ""); !strings.Contains(page, "# TYPE "+family+" ") {
			t.Errorf("%s has no %s", path, family)
		}
	}
	for _, path := range []string{"/", "/metrics", "/backend/", "/gateway/../internal/send", "/debug/pprof/", "/api/tasks"} {
		if got, _ := ask(t, "GET", port+path, ""); got != http.StatusNotFound {
			t.Errorf("%s at the port for metrics: got %d, want 404", path, got)
		}
	}

	if page := mustAsk(t, "GET", site+"/", ""); !strings.Contains(page, "new EventSource(") {
		t.Errorf("the page is not ours: %.200s", page)
	}
	es := openEventSource(t, site+startTask(t, site, "", oneExternal), retryScale(0.05))
	progress := func() { mustAsk(t, "POST", site+"/api/tasks/t/progress", `{"value":0.5}`) }
	progress()
	waitTold(t, es, "1 task_started", "2 progress_update") // at once: nginx buffers nothing

	// While the gateway is down, nginx keeps the page trying. Afterwards the page gets what it has missed.
	host.gateway.kill(t)
	before := es.opens()
	eventually(t, soon, "nginx answered in the gateway's place", func() bool { return es.opens() >= before+2 })
	progress()
	host.gateway.restart(t)
	mustAsk(t, "POST", site+"/api/tasks/t/complete", `{"result":null}`)
	waitTold(t, es, "1 task_started", "2 progress_update", "3 progress_update", "4 task_completed", "connection_close task_completed")

	wantHidden(t, site)
}

// Behind nginx, too, each line of a long body is taken as a report when it comes, and a failure may have 4 MiB.
func TestNginxReports(t *testing.T) {
	needs(t, "nginx", "root")
	t.Parallel()
	backend := startBackend(t)
	for file, servers := range map[string][]string{
		"deploy/nginx.conf":          {"127.0.0.1:8080", address(backend), "127.0.0.1:3000", address(backend)},
		"deploy/nginx-replicas.conf": {"10.0.0.1:80", address(backend), "10.0.0.2:80", address(backend), "10.0.0.3:80", address(backend)},
	} {
		t.Run(file, func(t *testing.T) {
			t.Parallel()
			site := startNginx(t, file, servers...).URL
			v := newVisitor(t, site, site)
			id := v.start("external", "{}")
			es := v.follow(id)
			r := reportAtLength(t, v, id)
			r.say(`{"text":"one"}` + "\n")
			wantStory(t, es, "task_started", "progress_update one")
			r.say(`{"text":"two"}` + strings.Repeat(" ", 200<<10) + "\n" + strings.Repeat("\n", 1<<20))
			r.body.Close()
			r.want("200 ")
			if got := v.post("/api/tasks/"+id+"/fail", `{"error":"`+strings.Repeat("x", 4<<20-100)+`"}`); !strings.HasPrefix(got, "200 ") {
				t.Errorf("a failure of 4 MiB: got %.200s", got)
			}
		})
	}
}

// A temporary error from nginx itself never makes an EventSource give up, over HTTP/1.1 or HTTP/2, even on a page of
// another site.
func TestNginxErrors(t *testing.T) {
	needs(t, "nginx", "root")
	t.Parallel()
	for _, tt := range []struct {
		name   string
		oldNew []string // what causes the error
		log    string   // what nginx logs then
	}{
		{"500, no descriptors", []string{"worker_rlimit_nofile 65536", "worker_rlimit_nofile 50"}, "24: Too many open files"},
		{"500, no connections", []string{"worker_connections 32768", "worker_connections 40"}, "worker_connections are not enough"},
		{"502", nil, "prematurely closed connection"},
		{"504", []string{"proxy_read_timeout 5m", "proxy_read_timeout 100ms"}, "timed out"},
		{"429, streams", []string{"limit_conn streams 1000", "limit_conn streams 5"}, "limiting connections"},
		{"429, requests", []string{"# limit_req", "limit_req", "20r/s", "1r/s", "burst=40", "burst=5"}, "limiting requests"},
		{"503", []string{"limit_conn_status 429;", "", "limit_conn streams 1000", "limit_conn streams 5"}, "limiting connections"},
	} {
		for file, servers := range map[string][]string{
			"nginx.conf":          {"server 127.0.0.1:8080", "server 127.0.0.1:3000"},
			"nginx-replicas.conf": {"server 10.0.0.1:80", "server 10.0.0.2:80", "server 10.0.0.3:80"},
		} {
			for _, scheme := range []string{"http", "https"} { // 1.1 and 2
				if scheme == "http" && strings.Contains(tt.name, "no connections") {
					continue // nginx can accept no connection, so it answers nothing
				}
				t.Run(tt.name+", "+file+", "+scheme, func(t *testing.T) {
					t.Parallel()
					gateway := serveTest(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						switch {
						case r.URL.Path == "/readyz":
						case tt.name == "502":
							panic(http.ErrAbortHandler)
						case tt.name == "504":
							<-r.Context().Done()
						default:
							streamThat(": stream\n", true)(w, r)
						}
					}))
					secure, cert := fmt.Sprintf("127.0.0.1:%d", freePort(t)), writeCertificate(t)
					oldNew := append(slices.Clone(tt.oldNew), "worker_processes auto", "worker_processes 1", "listen 80;",
						"listen 80; listen "+secure+" ssl http2; ssl_certificate "+cert+"; ssl_certificate_key "+cert+";")
					for _, server := range servers {
						oldNew = append(oldNew, server, "server "+strings.TrimPrefix(gateway.URL, "http://"))
					}
					nginx := startNginx(t, "deploy/"+file, oldNew...)
					base := nginx.URL
					if scheme == "https" {
						base = "https://" + secure
					}
					away := askForStreams(t, base+"/api/sse/x", 45)
					if away == 0 || !strings.Contains(nginx.output(), tt.log) {
						t.Errorf("%d of 45 pages were told to come back; nginx logged %q: %v", away, tt.log,
							strings.Contains(nginx.output(), tt.log))
					}
				})
			}
		}
	}
}

// askForStreams opens n streams at once, as pages of another site would, and returns how many the proxy told to come
// back. Each of the others must get a stream or a network error, unless it still waits for the proxy.
func askForStreams(t testing.TB, target string, n int) (away int) {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	request := func() (answer string) {
		req, _ := http.NewRequestWithContext(ctx, "GET", target, nil)
		req.Header.Set("Accept", "text/event-stream")
		req.Header.Set("Origin", "https://other.example")
		resp, err := transport.RoundTrip(req)
		if err != nil {
			return "network error"
		}
		all.Go(func() {
			<-ctx.Done() // the stream stays
			resp.Body.Close()
		})
		line, _ := bufio.NewReader(resp.Body).ReadString('\n')
		h := resp.Header
		return fmt.Sprintf("%d %s, %s, %s, %s, %s", resp.StatusCode, h.Get("Content-Type"), h.Get("Cache-Control"),
			h.Get("Access-Control-Allow-Origin"), h.Get("Access-Control-Allow-Credentials"), strings.TrimSpace(line))
	}
	answers := make(chan string, n)
	answers <- request() // alone: over HTTP/2 the others share its connection
	for range n - 1 {
		all.Go(func() { answers <- request() })
	}
	streams := 0
	for patience, answered := soon, 0; answered < n; answered++ {
		select {
		case answer := <-answers:
			switch answer {
			case "200 text/event-stream, no-store, https://other.example, true, retry: 3000":
				away++
				patience = time.Second // the rest may be waiting for the proxy
			case "200 Text/Event-Stream ;charset=utf-8; odd, , , , : stream":
				streams++
			case "network error":
			default:
				t.Errorf("%s: a page got the answer %q", target, answer)
			}
		case <-time.After(patience):
			answered = n
		}
	}
	t.Logf("%s: %d streams, %d told to come back", target, streams, away)
	return away
}

// writeCertificate writes a certificate and its key to a file.
func writeCertificate(t testing.TB) (file string) {
	t.Helper()
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	cert := server.TLS.Certificates[0]
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	must(t, err)
	file = filepath.Join(t.TempDir(), "certificate.pem")
	writeFile(t, file, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}))+
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})))
	return file
}

// A limit counts the streams of each client. It uses X-Forwarded-For from a trusted proxy, and ignores any other.
func TestNginxLimitsClients(t *testing.T) {
	needs(t, "nginx", "root")
	t.Parallel()
	host := startHost(t)
	for _, proxies := range []string{"127.0.0.0/8", "10.0.0.0/8"} {
		t.Run(proxies, func(t *testing.T) {
			nginx := host.front(t, "10.0.0.0/8", proxies, "limit_conn streams 1000", "limit_conn streams 1")
			ask := func(client string) (first string) {
				req, _ := http.NewRequestWithContext(t.Context(), "GET", nginx.URL+"/api/sse/utils/version?request_id="+client, nil)
				req.Header.Set("X-Forwarded-For", "192.0.2.7, "+client)
				resp, err := new(http.Transport).RoundTrip(req)
				must(t, err)
				t.Cleanup(func() { resp.Body.Close() })
				body := make([]byte, 200)
				n, _ := resp.Body.Read(body)
				return string(body[:n])
			}
			away := func(text string) bool { return strings.Contains(text, "gateway is away") }
			first, again, other := ask("192.0.2.1"), ask("192.0.2.1"), ask("192.0.2.2")
			if away(first) || !away(again) || away(other) != (proxies == "10.0.0.0/8") {
				t.Errorf("got %q, again %q, another client %q", first, again, other)
			}
		})
	}
}

// Replicas do not know each other. All that makes them one service is an ingress that hashes the id.
func TestReplicas(t *testing.T) {
	needs(t, "nginx", "root")
	t.Parallel()

	var mu sync.Mutex // guards version and pollers
	version, pollers := "1.0", map[string]bool{}
	versions := serveTest(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		pollers[r.URL.RawQuery] = true
		fmt.Fprintf(w, `{"version":%q}`, version)
	}))

	poll := func(replica int) []string {
		return []string{"FRONTEND_VERSION_POLL_SECONDS=0.3", fmt.Sprintf("FRONTEND_VERSION_URL=%s?%d", versions.URL, replica)}
	}
	dying, staying := startHost(t, append(poll(0), "DATA_DIR="+t.TempDir())...), startHost(t, poll(1)...)
	dyingNginx := dying.front(t)
	embedded := startBackend(t, append(poll(2), "API_TOKEN="+deployToken)...)
	backends := []*process{dying.backend, staying.backend, embedded}
	ingress := startNginx(t, "deploy/nginx-replicas.conf", "10.0.0.1:80", address(dyingNginx),
		"10.0.0.2:80", address(staying.front(t)), "10.0.0.3:80", address(embedded)).URL

	waitAll := func(pages map[string]*eventSource, want ...string) {
		t.Helper()
		for _, es := range pages {
			waitTold(t, es, want...)
		}
	}
	ended := []string{"1 task_started", "2 task_completed", "connection_close task_completed"}
	// follow starts n external tasks, each with a follower.
	follow := func(name string, n int) map[string]*eventSource {
		followers := map[string]*eventSource{}
		for i := range n {
			id := fmt.Sprintf("%s-%d", name, i)
			path := startTask(t, ingress, "?task_id="+id, `{"type":"external","params":{"task_id":"`+id+`"}}`)
			followers[id] = openEventSource(t, ingress+path, retryScale(0.05))
		}
		waitAll(followers, "1 task_started")
		return followers
	}
	complete := func(id string, want int) {
		t.Helper()
		if got, answer := ask(t, "POST", ingress+"/api/tasks/"+id+"/complete", `{"result":null}`); got != want {
			t.Errorf("completing %s: got %d %.200s, want %d", id, got, answer, want)
		}
	}
	dies := func(id string) bool { // it is a task of the replica that dies
		status, _ := ask(t, "GET", dying.backend.URL+"/api/tasks/"+id+"/status", "")
		return status == http.StatusOK
	}

	followers := follow("first", 300)
	for i, b := range backends {
		if n := scrapeValue(mustAsk(t, "GET", b.URL+"/metrics", ""), `tasks{status="running"}`); n < 40 {
			t.Errorf("replica %d has %v of 300 tasks", i, n)
		}
	}
	for id := range followers {
		complete(id, http.StatusOK)
	}
	waitAll(followers, ended...)

	// An id that a backend chose does not lead to its replica; the route does.
	for i := range 6 {
		route := fmt.Sprintf("route=%d", i)
		es := openEventSource(t, ingress+startTask(t, ingress, "?"+route, oneDemo)+"&"+route)
		waitTold(t, es, "1 task_started", "2 progress_update step 1 of 1", "3 task_completed", "connection_close task_completed")
	}

	// Each replica polls on its own, and together they tell every page.
	eventually(t, soon, "every replica has polled", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(pollers) == len(backends)
	})
	tabs := map[string]*eventSource{}
	for i := range 40 {
		id := fmt.Sprint("tab-", i)
		tabs[id] = openEventSource(t, ingress+versionPath(id))
	}
	waitAll(tabs, "1 version 1.0")
	for i, b := range backends {
		series := `sse_gateway_active_connections{service="version"}`
		if n := scrapeValue(mustAsk(t, "GET", b.URL+"/metrics", ""), series); n < 1 {
			t.Errorf("replica %d has none of the %d version streams", i, len(tabs))
		}
	}
	mu.Lock()
	version = "1.1"
	mu.Unlock()
	waitAll(tabs, "1 version 1.0", "2 version 1.1")

	// While one replica is away, no other answers for its IDs, and the other replicas' IDs are not affected.
	followers = follow("second", 60)
	dyingNginx.kill(t)
	for id, es := range followers {
		want := http.StatusOK
		if dies(id) { // twice: by then a proxy that gives up on a server has done so
			before := es.opens()
			eventually(t, soon, "told to come back", func() bool { return es.opens() >= before+2 })
			want = http.StatusBadGateway
		}
		complete(id, want)
	}
	dyingNginx.restart(t)
	for id, es := range followers {
		if dies(id) {
			complete(id, http.StatusOK)
		} else if es.opens() != 1 {
			t.Errorf("the follower of %s reconnected", id)
		}
	}
	waitAll(followers, ended...)

	// Then its backend dies. Until it is back, no other replica says that its tasks are unknown. Then it resumes them.
	paths := map[string]string{}
	for i := range 20 {
		id := fmt.Sprintf("third-%d", i)
		path := startTask(t, ingress, "?task_id="+id, `{"type":"external","params":{"task_id":"`+id+`"}}`)
		if dies(id) {
			paths[id] = path
		}
	}
	dying.backend.kill(t)
	followers = map[string]*eventSource{}
	for id, path := range paths {
		followers[id] = openEventSource(t, ingress+path, retryScale(0.05))
		complete(id, http.StatusBadGateway)
	}
	for _, es := range followers {
		eventually(t, soon, "told to come back", func() bool { return es.opens() >= 2 })
	}
	dying.backend.restart(t)
	waitAll(followers, "1 task_started")
	for id := range followers {
		complete(id, http.StatusOK)
	}
	waitAll(followers, ended...)
	if len(paths) == 0 {
		t.Error("the replica that died had no task")
	}
}

// Monitoring

// metricNames returns the metrics that a PromQL expression names.
func metricNames(expr string) (names []string) {
	// These are not metrics: matchers, ranges, labels, functions.
	other := regexp.MustCompile(`\{.*?\}|\[.*?\]|\b(by|on|group_left) \(.*?\)|\w+\(`)
	for _, word := range regexp.MustCompile(`\b[a-z]\w+`).FindAllString(other.ReplaceAllString(expr, " "), -1) {
		if word != "sum" && word != "and" && word != "up" { // up is Prometheus' own
			names = append(names, regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(word, ""))
		}
	}
	return names
}

func TestMonitoring(t *testing.T) {
	needs(t, "prometheus", "promtool")
	t.Parallel()
	host := startHost(t, "DATA_DIR="+t.TempDir())
	tool(t, "", "promtool", "check", "config", "deploy/prometheus.yml") // with its rules

	families := map[string]bool{}
	for _, p := range []*process{host.backend, host.gateway} {
		page := mustAsk(t, "GET", p.URL+"/metrics", "")
		if out := tool(t, page, "promtool", "check", "metrics"); out != "" { // it also knows how metrics should be named
			t.Error(out)
		}
		for _, m := range regexp.MustCompile(`(?m)^# TYPE (\S+)`).FindAllStringSubmatch(page, -1) {
			families[m[1]] = true
		}
	}

	dir := t.TempDir()
	addr := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	writeFile(t, dir+"/alerts.yml", edited(t, "deploy/alerts.yml"))
	writeFile(t, dir+"/prometheus.yml", edited(t, "deploy/prometheus.yml", "15s", "200ms",
		"127.0.0.1:8080", address(host.backend),
		"127.0.0.1:3001", address(host.gateway)))
	prometheus := newProcess(t, "http://"+addr, nil, "prometheus", "--log.level=warn", "--web.listen-address="+addr,
		"--config.file="+dir+"/prometheus.yml", "--storage.tsdb.path="+dir+"/data")
	prometheus.probe = "/-/ready"
	prometheus.limit = soon
	prometheus.mustStart(t)
	api := func(path string, data any) {
		t.Helper()
		answer := struct{ Data any }{data}
		must(t, json.Unmarshal([]byte(mustAsk(t, "GET", prometheus.URL+"/api/v1"+path, "")), &answer))
	}
	// series counts what Prometheus finds for an expression.
	series := func(expr string) int {
		t.Helper()
		var data struct{ Result []any }
		api("/query?query="+url.QueryEscape(expr), &data)
		return len(data.Result)
	}
	eventually(t, soon, "both roles are scraped, more than once", func() bool {
		return series("up == 1") == 2 && series("count_over_time(up[1m]) > 1") == 2
	})

	// No graph of the dashboard is empty, and no family of metrics is missing.
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	must(t, json.Unmarshal([]byte(edited(t, "deploy/grafana.json", "$__rate_interval", "1m")), &dashboard))
	shown := map[string]bool{}
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			for _, name := range metricNames(target.Expr) {
				shown[name] = true
			}
			// On a busy machine a scrape may fail. That hides its series until the next one.
			eventually(t, soon, panel.Title+": something for "+target.Expr, func() bool { return series(target.Expr) > 0 })
		}
	}
	for name := range families {
		if !shown[name] {
			t.Errorf("%s is not in the dashboard", name)
		}
	}

	// The alerts can be evaluated, use only metrics that exist, and are quiet while all is well.
	type rule struct{ Name, Query, Health, LastError, State string }
	var rules struct{ Groups []struct{ Rules []rule } }
	eventually(t, soon, "the alerts were evaluated", func() bool {
		api("/rules", &rules)
		return !slices.ContainsFunc(rules.Groups[0].Rules, func(r rule) bool { return r.Health == "unknown" })
	})
	for _, r := range rules.Groups[0].Rules {
		if r.Health != "ok" || r.State != "inactive" {
			t.Errorf("got %+v, want ok and inactive", r)
		}
		for _, name := range metricNames(r.Query) {
			if !families[name] {
				t.Errorf("%s: there is no metric %s", r.Name, name)
			}
		}
	}
}

// Files that are run outside CI, by deploy/check-systemd.sh and deploy/check-kubernetes.sh

func TestSystemdUnit(t *testing.T) {
	needs(t, "systemd-analyze")
	t.Parallel()
	dir := t.TempDir()
	tool(t, "", "cp", "-r", "deploy/sidecast@backend.service.d", dir)
	template := filepath.Join(dir, "sidecast@.service")
	writeFile(t, template, edited(t, "deploy/sidecast@.service", "/usr/local/bin/sidecast", os.Args[0]))
	for _, role := range []string{"gateway", "backend"} {
		out := tool(t, "", "systemd-analyze", "verify", filepath.Join(dir, "sidecast@"+role+".service"))
		if strings.Contains(out, "sidecast") { // it may also complain about the machine's own units
			t.Errorf("%s: %s", role, out)
		}
	}
	// From 0, the perfect sandbox, to 100, none.
	tool(t, "", "systemd-analyze", "security", "--offline=true", "--threshold=9", template)
}

// The command in kubernetes.yaml edits nginx-replicas.conf to name the Service of each pod.
func TestKubernetesReplicas(t *testing.T) {
	needs(t, "sh")
	file := edited(t, "deploy/kubernetes.yaml")
	command := regexp.MustCompile(`"\$\((sed .*)\)"`).FindStringSubmatch(file)
	if command == nil {
		t.Fatal("kubernetes.yaml: no sed")
	}
	servers := regexp.MustCompile(`server (\S+):80 `).FindAllStringSubmatch(tool(t, "", "sh", "-c", command[1]), -1)
	for _, m := range servers {
		if !strings.Contains(file, "\n  name: "+m[1]+"\nspec:\n  selector: { statefulset.kubernetes.io/pod-name: "+m[1]+" }\n") {
			t.Errorf("kubernetes.yaml: there is no Service of the pod %s", m[1])
		}
	}
	if replicas := fmt.Sprintf("replicas: %d\n  ordinals: { start: 1 }", len(servers)); !strings.Contains(file, replicas) {
		t.Errorf("kubernetes.yaml: no %q", replicas)
	}
}

// To the program, a misspelt variable is just one that is not set, so the names are checked here.
func TestDeployedVariables(t *testing.T) {
	config := edited(t, "config.go")
	files := []string{"Dockerfile", "deploy/kubernetes.yaml", "deploy/sidecast@.service", "deploy/sidecast@backend.service.d/data.conf"}
	for _, file := range files {
		for _, m := range regexp.MustCompile(`\b([A-Z][A-Z_]+)(=|, value)`).FindAllStringSubmatch(edited(t, file), -1) {
			own := m[1] == "CGO_ENABLED" || m[1] == "COMMAND"
			if !own && !strings.Contains(config, `"`+m[1]+`"`) {
				t.Errorf("%s: sidecast does not read %s", file, m[1])
			}
		}
	}
}
