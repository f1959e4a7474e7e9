// The HTTP handlers of tasks: limits, reading, answers. What they decide on is in
// tasks.go.

package main

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/url"
	"time"
)

// taskView is a task as the API shows it.
type taskView struct {
	TaskID    string          `json:"task_id"`
	Type      string          `json:"type"`
	Status    taskStatus      `json:"status"`
	StartTime *time.Time      `json:"start_time"`
	EndTime   *time.Time      `json:"end_time"`
	Result    json.RawMessage `json:"result"`
	Error     *string         `json:"error"`
}

func (t *task) viewLocked() taskView {
	v := taskView{TaskID: t.id, Type: t.kind, Status: t.status, Result: t.result}
	if !t.start.IsZero() {
		start := t.start.UTC()
		v.StartTime = &start
	}
	if !t.end.IsZero() {
		end := t.end.UTC()
		v.EndTime = &end
	}
	if t.status == taskFailed {
		failure := t.err
		v.Error = &failure
	}
	return v
}

// serveStart is POST /api/tasks.
func (s *TaskService) serveStart(w http.ResponseWriter, r *http.Request) {
	body, err := readJSON(w, r, maxTaskBody)
	if err != nil {
		writeError(w, err)
		return
	}
	kind, err := body.required("type")
	if err != nil {
		writeError(w, err)
		return
	}
	params := object{}
	if raw, ok := body["params"]; ok {
		if params, err = parseObject(raw); err != nil {
			writeError(w, badParam("params must be an object"))
			return
		}
	}
	t, known, err := s.Start(kind, params)
	if err != nil {
		writeError(w, err)
		return
	}
	streamURL := "/api/sse/tasks?task_id=" + url.QueryEscape(t.id)
	if known {
		if view, err := s.Status(t.id); err == nil {
			writeJSON(w, http.StatusOK, struct {
				taskView
				StreamURL string `json:"stream_url"`
			}{view, streamURL})
			return
		}
	}
	writeJSON(w, http.StatusAccepted, map[string]any{"task_id": t.id, "stream_url": streamURL, "status": taskPending})
}

// serveList is GET /api/tasks.
func (s *TaskService) serveList(w http.ResponseWriter, r *http.Request) {
	writeJSON(w, http.StatusOK, map[string]any{"tasks": s.List()})
}

// serveStatus is GET /api/tasks/{task_id}/status.
func (s *TaskService) serveStatus(w http.ResponseWriter, r *http.Request) {
	view, err := s.Status(r.PathValue("task_id"))
	if err != nil {
		writeError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, view)
}

// serveCancel is POST /api/tasks/{task_id}/cancel.
func (s *TaskService) serveCancel(w http.ResponseWriter, r *http.Request) {
	writeSuccess(w, s.Cancel(r.PathValue("task_id")), "task cancelled")
}

// serveDelete is DELETE /api/tasks/{task_id}.
func (s *TaskService) serveDelete(w http.ResponseWriter, r *http.Request) {
	writeSuccess(w, s.Delete(r.PathValue("task_id")), "task deleted")
}

// serveProgress is POST /api/tasks/{task_id}/progress.
func (s *TaskService) serveProgress(w http.ResponseWriter, r *http.Request) {
	s.serveReport(w, r, func(id string, body object) (string, error) {
		progress, err := text(body, "text", "")
		if err != nil {
			return "", err
		}
		value, err := parseNumber(body["value"])
		if err != nil {
			return "", badRequest("bad_value", "value must be a number")
		}
		return s.Progress(id, progress, value)
	})
}

// serveComplete is POST /api/tasks/{task_id}/complete.
func (s *TaskService) serveComplete(w http.ResponseWriter, r *http.Request) {
	s.serveReport(w, r, func(id string, body object) (string, error) {
		if len(body["result"]) > maxTaskResult {
			return "", errResultTooLarge
		}
		return s.Complete(id, bytes.Clone(body["result"])) // which would keep all of the body
	})
}

// serveFail is POST /api/tasks/{task_id}/fail.
func (s *TaskService) serveFail(w http.ResponseWriter, r *http.Request) {
	s.serveReport(w, r, func(id string, body object) (string, error) {
		failure, err := text(body, "error", "")
		if err != nil || failure == "" {
			return "", badParam("error must be a string of 1 to %d bytes", maxTaskText)
		}
		return s.Fail(id, failure)
	})
}

func (s *TaskService) serveReport(w http.ResponseWriter, r *http.Request, report func(id string, body object) (eventID string, err error)) {
	body, err := readJSON(w, r, maxTaskBody)
	if err != nil {
		writeError(w, err)
		return
	}
	eventID, err := report(r.PathValue("task_id"), body)
	if err != nil {
		writeError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, map[string]string{"event_id": eventID})
}

func writeSuccess(w http.ResponseWriter, err error, message string) {
	if err != nil {
		writeError(w, err)
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{"success": true, "message": message})
}
