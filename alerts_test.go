package main

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// alertTests has for each alert an hour at a quiet site, at a busy one and at a broken one, in promtool's notation with
// a sample each minute. The alert must never fire at the first two. At the broken one it must fire at the end, with
// these labels and this summary.
var alertTests = map[string]struct {
	quiet, busy, broken inputs
	labels              map[string]string
	summary             string
}{
	"SidecastDown": {
		inputs{`up{job="sidecast-backend",instance="b"}`: "1x60"},
		inputs{`up{job="sidecast-backend",instance="b"}`: "1x20 0 1x39"}, // one scrape failed
		inputs{`up{job="sidecast-backend",instance="b"}`: "1x20 0x40"},
		map[string]string{"job": "sidecast-backend", "instance": "b"}, "sidecast-backend at b does not answer"},
	"SidecastRestarts": {
		inputs{`process_start_time_seconds{job="sidecast-backend",instance="b"}`: "1x60"},
		inputs{`process_start_time_seconds{job="sidecast-backend",instance="b"}`: "1x20 2x5 3x5 4x30"}, // deployments
		inputs{`process_start_time_seconds{job="sidecast-backend",instance="b"}`: "1x30 2x4 3x4 4x4 5x4 6x4 7x4"},
		map[string]string{"job": "sidecast-backend", "instance": "b"},
		"sidecast-backend at b keeps restarting, and ends what it runs each time"},
	"SidecastStreamsRefused": {
		inputs{connects("rejected"): "0x10 1x20 2x30", connects("accepted"): "0x60"},
		inputs{connects("rejected"): "0+60x60", connects("accepted"): "0+60x60"},
		inputs{connects("rejected"): "0+10x60", connects("accepted"): "100x60"},
		map[string]string{"instance": "g"}, "The backend refuses the streams of g: do both have the same secret?"},
	"SidecastStreamsTurnedAway": {
		inputs{`gateway_refused_total{instance="g",reason="capacity"}`: "0x20 5x40"},
		inputs{`gateway_refused_total{instance="g",reason="capacity"}`: "0x20 500x40"}, // one rush
		inputs{`gateway_refused_total{instance="g",reason="capacity"}`: "0x20 0+10x40"},
		map[string]string{"instance": "g"}, "g has all the streams that MAX_CONNECTIONS allows, and turns others away"},
	"SidecastCallbacksFail": {
		inputs{connects("timeout"): "0x10 1x4 2x4 3x4 4x40", connects("accepted"): "0x60"},
		inputs{connects("timeout"): "0+20x60", connects("accepted"): "0+1000x60"},
		inputs{connects("timeout"): "0x20 0+20x40", connects("accepted"): "0+1x60"},
		map[string]string{"instance": "g", "action": "connect"}, "g does not reach the backend for connect callbacks"},
	"SidecastSendsFail": {
		inputs{sends("error"): "0x10 1x4 2x4 3x40", sends("success"): "0x60"},
		inputs{sends("error"): "0+20x60", sends("success"): "0+1000x60"},
		inputs{sends("error"): "0x20 0+20x40", sends("success"): "0+1x60"},
		map[string]string{"instance": "b"}, "b fails to give events to the gateway"},
	"SidecastSendsSlow": {
		inputs{took("1"): "0x60", took("2.5"): "0x10 1x10 2x40", took("+Inf"): "0x10 1x10 2x40", tookCount: "0x10 1x10 2x40"},
		inputs{took("1"): "0+1000x60", took("2.5"): "0+1005x60", took("+Inf"): "0+1005x60", tookCount: "0+1005x60"},
		inputs{took("1"): "0+10x60", took("2.5"): "0+10x60", took("5"): "0+20x60", took("+Inf"): "0+20x60", tookCount: "0+20x60"},
		map[string]string{"instance": "b"}, "One send of b in a hundred takes 4.95s"},
	"SidecastStreamsCut": {
		inputs{ended("error"): "0+4x60", ended("client_closed"): "0x60"}, // one slow phone
		inputs{ended("error"): "0+50x60", ended("client_closed"): "0+1000x60"},
		inputs{ended("error"): "0+50x60", ended("client_closed"): "0+100x60"},
		map[string]string{"instance": "g"}, "Many clients of g are too slow for what they are sent"},
	"SidecastConnectionsDiffer": {
		inputs{`sse_gateway_active_connections{service="task"}`: "0x60", "gateway_streams": "8x60"},
		inputs{`sse_gateway_active_connections{service="task"}`: "1000+10x60", "gateway_streams": "1050+10x60"},
		inputs{`sse_gateway_active_connections{service="task"}`: "100x60", "gateway_streams": "70x60"},
		nil, "Backends and gateways disagree by 30 streams, for longer than a sweep"},
	"SidecastEventsDropped": {
		inputs{`sse_outbox_dropped_total{instance="b",service="task",reason="limit"}`: "0x10 500x50", sends("success"): "0x60"},
		inputs{`sse_outbox_dropped_total{instance="b",service="task",reason="limit"}`: "0+200x60", sends("success"): "0+5000x60"},
		inputs{`sse_outbox_dropped_total{instance="b",service="task",reason="limit"}`: "0+200x60", sends("success"): "0+500x60"},
		map[string]string{"instance": "b", "service": "task"}, "b dropped task events: too many wait"},
	"SidecastTasksWait": {
		inputs{waiting: "0x60"},
		inputs{waiting: "50x10 0 40x10 0 30x10 0x30"},
		inputs{waiting: "0x30 1x30"},
		map[string]string{"job": "sidecast-backend", "instance": "b", "status": "pending"},
		"Tasks at b wait for a worker all the time"},
	"SidecastTasksFail": {
		inputs{tasksEnded("failed"): "0x10 1x12 2x40", tasksEnded("completed"): "0x60"}, // two in twelve minutes
		inputs{tasksEnded("failed"): "0+10x60", tasksEnded("completed"): "0+20x60"},
		inputs{tasksEnded("failed"): "0+2x60", tasksEnded("completed"): "0+1x60"},
		map[string]string{"instance": "b", "type": "demo"}, "Most demo tasks at b fail"},
	"SidecastCannotStore": {
		inputs{writable: "1x60"},
		inputs{writable: "1x20 0 1x39"}, // while something large is removed
		inputs{writable: "1x20 0x40"},
		map[string]string{"job": "sidecast-backend", "instance": "b"},
		"b has no room to write in DATA_DIR, and refuses what is new"},
	"SidecastFileDescriptors": {
		inputs{fds("open"): "12x60", fds("max"): "1024x60"},
		inputs{fds("open"): "700x60", fds("max"): "1000x60"},
		inputs{fds("open"): "900x60", fds("max"): "1000x60"},
		map[string]string{"job": "sidecast-gateway", "instance": "g"}, "g has 90% of its file descriptors in use"},
}

type inputs map[string]string

const (
	tookCount = `sse_gateway_send_duration_seconds_count{instance="b"}`
	writable  = `sidecast_journal_writable{job="sidecast-backend",instance="b"}`
	waiting   = `tasks{job="sidecast-backend",instance="b",status="pending"}`
)

func connects(status string) string {
	return `gateway_callbacks_total{instance="g",action="connect",status="` + status + `"}`
}
func sends(status string) string {
	return `sse_gateway_events_sent_total{instance="b",service="task",status="` + status + `"}`
}
func took(le string) string {
	return `sse_gateway_send_duration_seconds_bucket{instance="b",le="` + le + `"}`
}
func ended(reason string) string {
	return `gateway_streams_closed_total{instance="g",reason="` + reason + `"}`
}
func tasksEnded(status string) string {
	return `task_executions_total{instance="b",type="demo",status="` + status + `"}`
}
func fds(which string) string {
	return `process_` + which + `_fds{job="sidecast-gateway",instance="g"}`
}

// An alert that fires at a quiet site is soon ignored at every site.
func TestAlerts(t *testing.T) {
	needs(t, "promtool")
	t.Parallel()
	dir := t.TempDir()
	rules := edited(t, "deploy/alerts.yml")
	writeFile(t, dir+"/alerts.yml", rules)
	type object = map[string]any
	var tests []object
	for _, m := range regexp.MustCompile(`- alert: (\w+)`).FindAllStringSubmatch(rules, -1) {
		alert := m[1]
		tt, ok := alertTests[alert]
		if !ok {
			t.Errorf("%s has no test", alert)
		}
		broken3 := inputs{} // Prometheus 3 writes all bounds with a decimal point
		for key, values := range tt.broken {
			broken3[strings.Replace(key, `le="1"`, `le="1.0"`, 1)] = values
		}
		for name, in := range map[string]inputs{"quiet": tt.quiet, "busy": tt.busy, "broken": tt.broken, "broken, 3": broken3} {
			var input, want []object
			for key, values := range in {
				input = append(input, object{"series": key, "values": values})
			}
			fires, minutes := []object{}, 60
			if strings.HasPrefix(name, "broken") {
				fires, minutes = []object{{"exp_labels": tt.labels, "exp_annotations": object{"summary": tt.summary}}}, 1
			}
			for i := range minutes { // backwards from the end
				want = append(want, object{"alertname": alert, "eval_time": fmt.Sprintf("%dm", 59-i), "exp_alerts": fires})
			}
			tests = append(tests, object{"name": alert + ", " + name, "interval": "1m", "input_series": input, "alert_rule_test": want})
		}
	}
	text, err := json.Marshal(object{"rule_files": []string{"alerts.yml"}, "evaluation_interval": "1m", "tests": tests}) // JSON is YAML
	must(t, err)
	writeFile(t, dir+"/test.yml", string(text))
	tool(t, "", "promtool", "test", "rules", dir+"/test.yml")
}
