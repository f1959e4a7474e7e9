package main

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// A proxyFile is one of the files in deploy and the program that it is for. SITE and PORT stand for the address of the test
// and DIR for its folder, which has a copy of deploy and the certificate tls.pem.
type proxyFile struct {
	file        string
	command     string
	oldNew      []string      // edits that every test needs
	http, https []string      // edits that make it serve one of the two at SITE
	heartbeat   time.Duration // of the gateway, if only the second one tells who left; 0: it is told at once
	lengths     bool          // over HTTP/2 a body must have a length
}

var proxyFiles = []proxyFile{
	{
		file:    "nginx.conf",
		command: "nginx -e stderr -c DIR/nginx.conf",
		oldNew:  []string{"worker_processes auto;", "daemon off; pid DIR/pid;", "/etc/sidecast/", "DIR/", "http {", "http {\naccess_log off;"},
		http:    []string{"listen 80;", "listen SITE;"},
		https:   []string{"listen 80;", "", "# listen 443 ", "listen SITE ", "# ssl_", "ssl_", "tls.crt", "tls.pem", "tls.key", "tls.pem"},
	},
	{
		file:    "haproxy.cfg",
		command: "haproxy -db -f DIR/haproxy.cfg",
		oldNew:  []string{"maxconn 32768", "maxconn 1000"},
		http:    []string{"bind :80", "bind SITE"},
		https:   []string{"bind :80", "", "# bind :443", "bind SITE", "/etc/sidecast/", "DIR/"},
	},
	{
		file:    "Caddyfile",
		command: "caddy run --adapter caddyfile --config DIR/Caddyfile",
		http:    []string{"\n:80 {", "\nhttp://SITE {"},
		https:   []string{"\n:80 {", "\nhttps://SITE {\ntls DIR/tls.pem DIR/tls.pem", "admin off", "admin off\nauto_https off"},
	},
	{
		file:    "apache.conf",
		command: "apache2 -DFOREGROUND -f DIR/apache.conf",
		oldNew:  []string{"/run/", "DIR/", "/var/log/apache2/error.log", "/dev/stderr", "/etc/sidecast", "DIR"},
		http:    []string{"Listen 80", "Listen SITE"},
		https: []string{"Listen 80", "", "# Listen 443", "Listen SITE", "*:443", "SITE", "\n# LoadModule", "\nLoadModule",
			"# <", "<", "\n#     ", "\n"},
		heartbeat: time.Second,
	},
	{
		file:    "lighttpd.conf",
		command: "lighttpd -D -f DIR/lighttpd.conf",
		oldNew:  []string{"/var/log/lighttpd/error.log", "/dev/stderr", "/etc/sidecast/", "DIR/", "65536", "2048", "32768", "1024"},
		http:    []string{"= 80\n", "= PORT\nserver.bind = \"127.0.0.1\"\n"},
		https: []string{"server.port      = 80\n", "server.bind = \"127.0.0.1\"\n", "# server.port     = 443", "server.port = PORT",
			"\n# server.modules", "\nserver.modules", "\n# ssl.", "\nssl."},
		heartbeat: time.Second,
		lengths:   true,
	},
	{
		file:    "varnish.vcl",
		command: "varnishd -F -n DIR/varnish -a SITE -p timeout_idle=300 -f DIR/varnish.vcl",
	},
}

// Over HTTP/1.1 and HTTP/2 each proxy serves, hides what is not for browsers, holds nothing back, tells who left, and
// loses no page while the gateway is away.
func TestProxies(t *testing.T) {
	if os.Getenv("SIDECAST_PROXIES") == "" {
		t.Skip("this takes twenty seconds: .ci/run runs it in a step of its own, with SIDECAST_PROXIES=1")
	}
	t.Setenv("SSL_CERT_FILE", writeCertificate(t)) // what Go's clients trust
	for _, proxy := range proxyFiles {
		t.Run(proxy.file, func(t *testing.T) {
			t.Parallel()
			proxy.test(t, 1)
		})
		if proxy.https != nil {
			t.Run(proxy.file+", HTTP/2", func(t *testing.T) {
				t.Parallel()
				proxy.test(t, 2)
			})
		}
	}
}

func (proxy proxyFile) test(t *testing.T, version int) {
	needs(t, strings.Fields(proxy.command)[0], "root")
	host := startHost(t, fmt.Sprintf("HEARTBEAT_INTERVAL_SECONDS=%v", cmp.Or(proxy.heartbeat, 15*time.Second).Seconds()))
	site := proxy.start(t, host, version).URL

	// A whole task.
	es := openEventSource(t, site+startTask(t, site, "", oneDemo), retryScale(0.05))
	waitTold(t, es, "1 task_started", "2 progress_update step 1 of 1", "3 task_completed", "connection_close task_completed")

	// What is not for browsers.
	wantHidden(t, site)

	// Each event comes at once. The median counts, as this machine may be busy.
	es = openEventSource(t, site+startTask(t, site, "", oneExternal), retryScale(0.05))
	waitTold(t, es, "1 task_started")
	if got := es.look().http; got != version {
		t.Errorf("the stream came over HTTP/%d, want %d", got, version)
	}
	var took []time.Duration
	for i := range 9 {
		began := time.Now()
		mustAsk(t, "POST", site+"/api/tasks/t/progress", fmt.Sprintf(`{"value":0.%d}`, i+1))
		es.waitFor(t, soon, func(got []message) bool { return len(told(got)) >= i+2 })
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	if took[4] > 150*time.Millisecond {
		t.Errorf("an event takes %v, want them at once", took)
	}

	// A failure may have a large text.
	startTask(t, site, "", `{"type":"external","params":{"task_id":"large"}}`)
	mustAsk(t, "POST", site+"/api/tasks/large/fail", fmt.Sprintf(`{"error":%q}`, strings.Repeat("x", 3<<20)))

	// A worker's reports may be one body. Each comes as it is made; here the last one after a pause, below.
	worker := openEventSource(t, site+startTask(t, site, "", `{"type":"external","params":{"task_id":"worker"}}`), retryScale(0.05))
	waitTold(t, worker, "1 task_started")
	body, reports := io.Pipe()
	defer reports.Close()
	reported := make(chan error, 1)
	req, err := http.NewRequest("POST", site+"/api/tasks/worker/progress", body)
	must(t, err)
	req.Header.Set("Authorization", "Bearer "+deployToken)
	req.Header.Set("Content-Type", "application/x-ndjson")
	transport := &http.Transport{TLSClientConfig: new(tls.Config), ForceAttemptHTTP2: !proxy.lengths}
	defer transport.CloseIdleConnections()
	go func() {
		resp, err := transport.RoundTrip(req)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = errors.New(resp.Status)
		}
		reported <- err
	}()
	fmt.Fprintln(reports, `{"text":"one"}`)
	waitTold(t, worker, "1 task_started", "2 progress_update one")
	paused := time.Now()

	// The backend learns who left.
	active := func() float64 {
		return scrapeValue(mustAsk(t, "GET", host.backend.URL+"/metrics", ""), `sse_gateway_active_connections{service="version"}`)
	}
	open := func(name string, n int) (pages []*eventSource) {
		for i := range n {
			pages = append(pages, openEventSource(t, fmt.Sprintf("%s/api/sse/utils/version?request_id=%s-%d", site, name, i), retryScale(0.05)))
		}
		return pages
	}
	pages := open("leaver", 6)
	eventually(t, soon, "all pages are known", func() bool { return active() == 6 })
	for _, page := range pages[:3] {
		page.close()
	}
	eventually(t, time.Second+2*proxy.heartbeat, "the backend knows who left", func() bool { return active() == 3 })

	// No page gives up while the gateway is away, and each gets what it has missed.
	pages = append(pages[3:], open("page", 3)...)
	waitOpen(t, pages...)
	host.gateway.kill(t)
	killed := time.Now()
	mustAsk(t, "POST", site+"/api/tasks/t/progress", `{"text":"away"}`)
	eventually(t, soon, "the proxy answers in the gateway's place, also to pages of another site", func() bool {
		return askForStreams(t, site+"/api/sse/x", 1) == 1
	})
	// No page gives up either when a gateway ends before it has answered.
	listener, err := net.Listen("tcp", address(host.gateway))
	must(t, err)
	go http.Serve(listener, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	time.Sleep(time.Until(killed.Add(4500 * time.Millisecond)))
	listener.Close()
	host.gateway.restart(t)
	mustAsk(t, "POST", site+"/api/deployments/version", `{"version":"2.0"}`)
	for _, page := range pages {
		page.waitFor(t, soon, func(got []message) bool { return slices.Contains(told(got), "1 version 2.0") })
		if page.failure() != 0 {
			t.Errorf("a page gave up on a %d", page.failure())
		}
	}

	time.Sleep(time.Until(paused.Add(7 * time.Second)))
	fmt.Fprintln(reports, `{"text":"two"}`)
	waitTold(t, worker, "1 task_started", "2 progress_update one", "3 progress_update two")
	must(t, reports.Close())
	if err := <-reported; err != nil {
		t.Errorf("reports in one body: %v", err)
	}

	mustAsk(t, "POST", site+"/api/tasks/t/complete", `{"result":null}`)
	failure := es.waitClosed(t, soon)
	if got := told(es.events()); failure != http.StatusGone || len(got) != 13 {
		t.Errorf("the task's page was told %q and then %d, want each of 12 events once, the end, and 410", got, failure)
	}
}

// start starts the proxy in front of a host.
func (proxy proxyFile) start(t *testing.T, host host, version int) *process {
	t.Helper()
	dir, site := t.TempDir(), fmt.Sprintf("127.0.0.1:%d", freePort(t))
	scheme, edits := "http://", proxy.http
	if version == 2 {
		scheme, edits = "https://", proxy.https
	}
	conf := edited(t, "deploy/"+proxy.file, slices.Concat(proxy.oldNew, edits)...)
	port := func(address string) string { return address[len("127.0.0.1:"):] }
	here := strings.NewReplacer("DIR", dir, "SITE", site, "PORT", port(site),
		"127.0.0.1:8080", address(host.backend), `"port" => 8080`, `"port" => `+port(address(host.backend)),
		"127.0.0.1:3000", address(host.gateway), `"port" => 3000`, `"port" => `+port(address(host.gateway)))
	// Apache and Varnish drop root privileges before they have opened all the files that they use.
	must(t, errors.Join(os.CopyFS(dir, os.DirFS("deploy")), os.Chmod(filepath.Dir(dir), 0o711)))
	writeFile(t, filepath.Join(dir, proxy.file), here.Replace(conf))
	writeFile(t, dir+"/tls.pem", edited(t, os.Getenv("SSL_CERT_FILE")))
	return newProcess(t, scheme+site, []string{"XDG_DATA_HOME=" + dir, "XDG_CONFIG_HOME=" + dir},
		strings.Fields(here.Replace(proxy.command))...).mustStart(t)
}
